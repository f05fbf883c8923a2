// Blocks of numbers that attention in training is made of: products whose sums stay in registers.
#pragma once
#include <algorithm>

#include "vec.h"

namespace mor {

constexpr int64_t QUERY_BLOCK = 48, KEY_BLOCK = 96, HIGH = 6;
constexpr int64_t WIDE = MOST_SUMS / HIGH;  // vectors across in `mix`
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// 2^x for x that is not much above 0, to 2e-9; exactly 0 below -126; nan stays nan.
static inline vec power(vec x) {
    const vec low = splat(-126.0f), shift = splat(12582912.0f);  // see vexp
    const vec y = x < low ? low : x, shifted = y + shift, r = y - (shifted - shift);
    vec p = splat(1.5345812009e-4f);
    p = p * r + 1.3399931219e-3f;
    p = p * r + 9.6184889571e-3f;
    p = p * r + 5.5503287770e-2f;
    p = p * r + 2.4022646891e-1f;
    p = p * r + 6.9314720574e-1f;
    p = p * r + 1.0f;
    ivec bits;
    std::memcpy(&bits, &shifted, sizeof(vec));
    bits = (bits << 23) + 0x3f800000;
    vec scale;
    std::memcpy(&scale, &bits, sizeof(vec));
    return x < low ? splat(0.0f) : p * scale;
}

// Numbers of two vectors in turn, from lane FROM on.
template <int FROM>
struct Zip {
    static constexpr int of(int i) { return FROM + i / 2 + i % 2 * W; }
};

// The columns of W rows of W numbers, as rows that lie `wide` apart: log2(W) perfect shuffles.
template <int LEFT = W>
static inline void transpose(const vec* from, float* to, int64_t wide) {
    if constexpr (LEFT == 1) {
        for (int i = 0; i < W; i++) store(to + i * wide, from[i]);
    } else {
        vec next[W];
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = pick<Zip<0>>(from[i], from[i + W / 2]);
            next[2 * i + 1] = pick<Zip<W / 2>>(from[i], from[i + W / 2]);
        }
        transpose<LEFT / 2>(next, to, wide);
    }
}

// d numbers, and zeros up to the next multiple of W.
static inline void take(const float* from, int64_t d, float scale, float* to) {
    int64_t i = 0;
    for (; i + W <= d; i += W) store(to + i, load(from + i) * scale);
    if (i == d) return;
    for (int64_t c = 0; c < W; c++) to[i + c] = i + c < d ? from[i + c] * scale : 0.0f;
}

// The other way round, with a factor.
static inline void give(const float* from, int64_t d, float scale, float* to) {
    int64_t i = 0;
    for (; i + W <= d; i += W) store(to + i, load(from + i) * scale);
    for (; i < d; i++) to[i] = from[i] * scale;
}

// `count` rows [., dp] as columns [dp][KEY_BLOCK]; zeros behind them up to the next multiple of W.
static void turn_block(const float* rows, int64_t count, int64_t dp, float* to) {
    for (int64_t first = 0; first < count; first += W)
        for (int64_t i = 0; i < dp; i += W) {
            vec block[W];
            for (int64_t j = 0; j < W; j++)
                block[j] = first + j < count ? load(rows + (first + j) * dp + i) : (vec){};
            transpose(block, to + i * KEY_BLOCK + first, KEY_BLOCK);
        }
}

// TILE rows [., dp] with C vectors of columns [dp][KEY_BLOCK].
template <int C>
static inline __attribute__((always_inline)) void meet(const float* __restrict rows, int64_t dp,
                                                       const float* __restrict columns,
                                                       vec (*acc)[C]) {
    vec a[TILE][C] = {};
    for (int64_t i = 0; i < dp; i++) {
        vec b[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) b[c] = load(columns + i * KEY_BLOCK + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < TILE; r++) {
            const vec x = splat(rows[r * dp + i]);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) a[r][c] = fused(x, b[c], a[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = a[r][c];
}

// to [HIGH][dp] += sum over steps of x(r, i) b[i]: C vectors of b [steps][dp] from column `from` on,
// x(r, i) = x[r * R + i * I].
template <int R, int I, int C>
static void mix_tile(const float* __restrict x, const float* __restrict b, int64_t steps, int64_t dp,
                     float* __restrict to) {
    vec a[HIGH][C];
#pragma GCC unroll 8
    for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) a[r][c] = load(to + r * dp + c * W);
    for (int64_t i = 0; i < steps; i++) {
        vec own[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) own[c] = load(b + i * dp + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < HIGH; r++) {
            const vec chance = splat(x[r * R + i * I]);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) a[r][c] = fused(chance, own[c], a[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) store(to + r * dp + c * W, a[r][c]);
}

template <int R, int I>
static void mix(const float* x, const float* b, int64_t steps, int64_t dp, float* to) {
    int64_t v = 0;
    for (const int64_t all = dp / W; v < all;) {
        const int64_t left = std::min(all - v, WIDE);
        with_count<WIDE>(left, [&](auto c) {
            mix_tile<R, I, c()>(x, b + v * W, steps, dp, to + v * W);
        });
        v += left;
    }
}

// Places that a query does not see get -inf: its last is `slot`, column 0 is key `base`.
static inline vec hide(vec scores, int64_t slot, int64_t base) {
    ivec lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    const int32_t last = (int32_t)std::min<int64_t>(std::max<int64_t>(slot - base, -1), W);
    return lanes <= (last - (ivec){}) ? scores : splat(-INFINITY);
}

}  // namespace mor
