// Functions of single numbers. Every number goes through a whole vector, the last ones too, so that
// its result does not hang on its place or on how many there are. (PyTorch's own take the last few
// numbers of a tensor one by one, with another exp.) The plain forms are PyTorch's.
#pragma once
#include "vec.h"

namespace mor {

template <class Function>
static inline vec each(vec x, Function function) {
    for (int64_t i = 0; i < W; i++) x[i] = function(x[i]);
    return x;
}

// 0: sigmoid, 1: tanh, 2: silu, 3: gelu, the exact one.
static inline vec pointwise(int kind, vec x) {
    switch (kind) {
        case 0: return 1.0f / (1.0f + each(-x, [](float y) { return std::exp(y); }));
        case 1: return each(x, [](float y) { return std::tanh(y); });
        case 2: return silu(x);
        default: return 0.5f * x * (1.0f + each(x * 0.70710678118654752f,
                                                [](float y) { return std::erf(y); }));
    }
}

// Numbers [begin, begin + W) of x [n], as far as there are any.
static inline void pointwise_at(int kind, const float* x, int64_t n, int64_t begin, float* out) {
    if (begin + W <= n) return store(out + begin, pointwise(kind, load(x + begin)));
    float rest[W] = {};
    const int64_t bytes = (n - begin) * sizeof(float);
    std::memcpy(rest, x + begin, bytes);
    store(rest, pointwise(kind, load(rest)));
    std::memcpy(out + begin, rest, bytes);
}

}  // namespace mor
