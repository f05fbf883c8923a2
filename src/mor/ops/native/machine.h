// What the processor can do at best: the measure that rates of products are held against.
#pragma once
#include "vec.h"

namespace mor {

// `steps` x 24 x 16 fused multiply-adds of numbers that stay in registers; the sum, so that it is done.
static float spin(int64_t steps) {
    constexpr int SUMS = MOST_SUMS;
    vec sums[SUMS];
    const vec factor = splat(0.999f), more = splat(1e-3f);
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; i++) sums[i] = splat((float)i);
    for (int64_t step = 0; step < steps * 24 * 16 / (SUMS * W); step++) {
        asm volatile("" ::: "memory");  // or the compiler would see through it
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * factor + more;
    }
    vec all = {};
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; i++) all += sums[i];
    return sum(all);
}

// The sum of n numbers, n a multiple of 8 vectors.
static float read_all(const float* x, int64_t n) {
    vec sums[8] = {};
    for (int64_t i = 0; i < n; i += 8 * W)
#pragma GCC unroll 8
        for (int64_t j = 0; j < 8; j++) sums[j] += load(x + i + j * W);
    vec all = {};
    for (int64_t j = 0; j < 8; j++) all += sums[j];
    return sum(all);
}

}  // namespace mor
