// Entries of the cache: floats, bfloat16, or bytes with a scale per head and token. The plain form is
// mor.engine.entries.
#pragma once
#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace mor {

struct bf16 {
    uint16_t bits;
};
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int8_t bvec __attribute__((vector_size(W), aligned(1), may_alias));

static inline vec load(const bf16* p) {
    const uvec wide = __builtin_convertvector(*(const hvec*)p, uvec) << 16;
    vec found;
    std::memcpy(&found, &wide, sizeof(vec));
    return found;
}
static inline vec load(const int8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(*(const bvec*)p, ivec), vec);
}

// Pool [pages, page_size, kv_heads, head_dim] and one page table [rows, layers, columns]. Entries
// are of type `kind`: 0 float, 1 bfloat16, 2 bytes with scales [pages, page_size, kv_heads].
struct Pages {
    void *keys, *values;
    float *key_scales, *value_scales;
    const int64_t* table;
    int64_t kind;
    int64_t page_size, kv_heads, head_dim, layers, columns;
    int64_t slot(int64_t row, int64_t layer, int64_t place) const {
        return table[(row * layers + layer) * columns + place / page_size] * page_size +
               place % page_size;
    }
};

// Scales of `count` entries of `d` numbers a head, one per lane; at: where the entries begin.
template <int64_t d>
static inline vec scales_of(const float* scales, const int64_t* at, int64_t count) {
    vec found = {};
    for (int64_t j = 0; j < count; j++) found[j] = scales[at[j] / d];
    return found;
}

// `d` numbers of one head become an entry; of bytes, its scale goes to `scale`.
static inline void put_entry(const float* x, int64_t d, float* to, float*) {
    std::memcpy(to, x, d * sizeof(float));
}
static inline void put_entry(const float* x, int64_t d, bf16* to, float*) {
    for (int64_t i = 0; i < d; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        // To the nearest, ties to even; what is not a number stays none.
        const bool number = (bits & 0x7fffffff) <= 0x7f800000;
        to[i].bits = number ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
    }
}
static inline void put_entry(const float* x, int64_t d, int8_t* to, float* scale) {
    int32_t size = 0;
    for (int64_t i = 0; i < d; i++) size = std::max(size, size_of(x[i]));
    const float most = of_size(size);
    *scale = most / 127.0f;  // not finite where some x is not: so is then what is read
    if (!(most > 0 && most < INFINITY)) return (void)std::memset(to, 0, d);
    const float inverse = 127.0f / most;
    for (int64_t i = 0; i < d; i++) to[i] = (int8_t)(int)std::rint(x[i] * inverse);
}

}  // namespace mor
