// Vectors of floats in GCC's and Clang's vector extension, as wide as the processor's registers: GCC
// keeps wider ones in memory, at a tenth of the speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace mor {

// W floats a vector. A panel of a packed matrix is PANEL = NV x W columns wide; TILE rows meet it at a
// time. The accumulators of a tile fill the registers: 8 x 3 of 32 (AVX-512), 6 x 2 of 16 (AVX2), 6 x 4
// of 32 (NEON), 3 x 4 of 16 (SSE).
#if defined(__AVX512F__)
constexpr int64_t W = 16, NV = 3, TILE = 8;
#elif defined(__AVX2__)
constexpr int64_t W = 8, NV = 2, TILE = 6;
#elif defined(__aarch64__)
constexpr int64_t W = 4, NV = 4, TILE = 6;
#else
constexpr int64_t W = 4, NV = 4, TILE = 3;
#endif
constexpr int64_t PANEL = NV * W, MOST_SUMS = NV * TILE;
constexpr int64_t LINE = 64;  // bytes that caches are filled by

typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));

// Calls function(std::integral_constant<int, n>()) for an n from 1 to MOST that is known only now.
template <int MOST, class Function>
static inline __attribute__((always_inline)) void with_count(int64_t n, const Function& function) {
    if constexpr (MOST == 1) function(std::integral_constant<int, 1>());
    else if (n >= MOST) function(std::integral_constant<int, MOST>());
    else with_count<MOST - 1>(n, function);
}

static inline vec load(const float* p) { return *(const vec*)p; }
static inline void store(float* p, vec v) { *(vec*)p = v; }
static inline vec splat(float x) { return x - (vec){}; }

// x y + z, in one step where the processor has one (build.py has the flag that says so to GCC). With AVX2
// in so many words: left to itself, GCC wants more registers for it than there are beside a tile's sums.
static inline float fused(float x, float y, float z) { return x * y + z; }
static inline vec fused(vec x, vec y, vec z) {
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(z) : "x"(x), "xm"(y));
    return z;
#else
    return x * y + z;
#endif
}

// Lane i of the result is number Index::of(i) of x and y, end to end.
template <class Index, int... I>
static inline vec pick(vec x, vec y, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(x, y, Index::of(I)...);
}
template <class Index>
static inline vec pick(vec x, vec y) {
    return pick<Index>(x, y, std::make_integer_sequence<int, W>());
}

// Lanes whose bit is set change places with those whose bit is not.
template <int BIT>
struct Swap {
    static constexpr int of(int i) { return i ^ BIT; }
};

// The sum, as a tree.
template <int BIT = W / 2>
static inline float sum(vec v) {
    if constexpr (BIT == 0) return v[0];
    else return sum<BIT / 2>(v + pick<Swap<BIT>>(v, v));
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
