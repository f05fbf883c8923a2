// Vectors of 16 floats in GCC's and Clang's vector extension: AVX-512, AVX2 or NEON by the target.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace mor {

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t W = 16;

// A panel of a packed matrix is PANEL columns wide; TILE rows meet it at a time. The accumulators of
// a tile fill the registers: 8 x 3 of 32 (AVX-512), 6 x 2 of 16 half as wide ones (AVX2).
#if defined(__AVX512F__)
constexpr int64_t NV = 3, TILE = 8;
#else
constexpr int64_t NV = 1, TILE = 6;
#endif
constexpr int64_t PANEL = NV * W;

static inline vec load(const float* p) { return *(const vec*)p; }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline vec splat(float x) { return x - (vec){}; }

// The sum, as a tree: in the same order on every machine.
static inline float sum(vec v) {
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    half h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    quarter q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
    q += __builtin_shufflevector(q, q, 2, 3, 0, 1);
    return q[0] + q[1];
}

// What |x| is compared by, and back: bits compare as numbers do, and above all of them stands what is
// no number, which the largest must not hide.
static inline int32_t size_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits & 0x7fffffff;
}
static inline float of_size(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

// e^x to about 2 units in the last place (Cephes' expf); 0 and inf beyond float's range.
static inline vec vexp(vec x) {
    const vec low = splat(-87.3f), high = splat(88.7f);
    vec y = x < low ? low : x;
    y = y > high ? high : y;
    const vec shift = splat(12582912.0f);  // 1.5 x 2^23: adding it rounds to a whole number
    vec n = (y * 1.44269504088896341f + shift) - shift;
    vec r = y - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec scale;
    std::memcpy(&scale, &exponent, sizeof(vec));
    vec result = p * scale;
    result = x < low ? splat(0.0f) : result;
    return x != x ? x : result;  // nan stays nan
}

static inline vec silu(vec x) { return x / (1.0f + vexp(-x)); }

}  // namespace mor
