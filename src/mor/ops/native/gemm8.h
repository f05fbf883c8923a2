// The same products with weights of 8 bits: a scale per output, and inputs of 8 bits with a scale
// per row and GROUP inputs, made on the way. Sums of a group are whole numbers and exact.
//
// A panel lies in memory as [inputs / 4][PANEL][4]; the rows as tiles [inputs / 4][TILE][4], with
// their scales [groups][TILE] behind. Processors multiply unsigned with signed bytes. With AVX512-VNNI
// inputs are stored plus 128, and what that adds to a sum is taken off by where the sum starts. With AVX2,
// which adds two products in 16 bits and would overflow, the weight's size meets the input with the
// weight's sign: 2 x 127 x 127 fits.
#pragma once
#include "gemm.h"
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mor {

// HALF rows of a tile meet a panel at a time: their sums fill the registers.
#if defined(__AVX512F__)
constexpr int64_t GROUP = 64, HALF = 4;
#else
constexpr int64_t GROUP = 64, HALF = 3;
#endif
#if defined(__AVX512VNNI__)
constexpr int32_t OFFSET = 128;
#else
constexpr int32_t OFFSET = 0;
#endif

static inline int64_t groups_of(int64_t k) { return (k + GROUP - 1) / GROUP; }

// Pack weight [n, k]: panels of bytes, a scale per column, and the start of each group's sums.
static void pack8(const float* weight, int64_t n, int64_t k, int8_t* out, float* scale,
                  int32_t* start) {
    const int64_t groups = groups_of(k), width = groups * GROUP;
    for (int64_t p = 0; p < panels(n); p++) {
        int8_t* panel = out + p * width * PANEL;
        int32_t* starts = start + p * groups * PANEL;
        for (int64_t c = 0; c < PANEL; c++) {
            const int64_t column = p * PANEL + c;
            int32_t size = 0;
            for (int64_t i = 0; column < n && i < k; i++)
                size = std::max(size, size_of(weight[column * k + i]));
            const float most = of_size(size);
            scale[column] = most / 127;
            for (int64_t g = 0; g < groups; g++) {
                int32_t sum = 0;
                for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i++) {
                    const bool real = column < n && i < k && most > 0 && most < INFINITY;
                    const int q = real ? (int)std::lrint(weight[column * k + i] * (127 / most)) : 0;
                    panel[(i / 4 * PANEL + c) * 4 + i % 4] = (int8_t)q;
                    sum += q;
                }
                starts[g * PANEL + c] = -OFFSET * sum;
            }
        }
    }
}

// Where a tile's bytes and scales lie among the bytes of all tiles.
static inline int64_t tile_bytes(int64_t k) {
    return groups_of(k) * (GROUP * TILE + TILE * (int64_t)sizeof(float));
}

// Row `row` [k] as bytes with their scales, into its place among tiles of bytes.
static void put_bytes(const float* from, int64_t row, int64_t k, uint8_t* bytes) {
    typedef uint8_t small __attribute__((vector_size(W)));
    const int64_t groups = groups_of(k);
    uint8_t* tile = bytes + row / TILE * tile_bytes(k);
    int32_t* fours = (int32_t*)tile + row % TILE;
    float* scales = (float*)(tile + groups * GROUP * TILE) + row % TILE;
    // Adding 1.5 x 2^23 rounds to the nearest whole number, which then is in the low bits.
    const float shift = 12582912.0f + OFFSET;
    for (int64_t g = 0; g < groups; g++, from += GROUP) {
        const float* x = from;
        float last[GROUP] = {};
        if (k - g * GROUP < GROUP) {
            std::memcpy(last, from, (k - g * GROUP) * sizeof(float));
            x = last;
        }
        ivec sizes = {};
        for (int64_t i = 0; i < GROUP; i += W) {
            const ivec size = *(const ivec*)(x + i) & 0x7fffffff;
            sizes = size > sizes ? size : sizes;
        }
        int32_t size = 0;
        for (int64_t i = 0; i < W; i++) size = std::max(size, sizes[i]);
        const float most = of_size(size);
        const float inverse = most > 0 ? 127 / most : 0;
        scales[g * TILE] = most / 127;  // not finite where some input is not: so is then the sum
        for (int64_t i = 0; i < GROUP; i += W) {
            const vec shifted = load(x + i) * inverse + shift;
            ivec whole;
            std::memcpy(&whole, &shifted, sizeof(vec));
            const small low = __builtin_convertvector(whole & 255, small);
            int32_t four[W / 4];
            std::memcpy(four, &low, sizeof(four));
            for (int64_t j = 0; j < W / 4; j++, fours += TILE) *fours = four[j];
        }
    }
}

// acc += the products of 4 bytes of a row (the same for all columns) with 4 of each column.
static inline ivec multiply(ivec acc, const uint8_t* row, const int8_t* panel) {
#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
    int32_t four;
    std::memcpy(&four, row, 4);
#endif
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(four),
                                     _mm512_loadu_si512(panel));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i weight = _mm256_loadu_si256((const __m256i*)panel);
    const __m256i input = _mm256_sign_epi8(_mm256_set1_epi32(four), weight);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), input);
    return acc + (ivec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int64_t c = 0; c < W; c++)
        for (int64_t i = 0; i < 4; i++) acc[c] += (int32_t)(int8_t)row[i] * panel[c * 4 + i];
    return acc;
#endif
}

// ROWS rows of a tile with one panel.
template <int ROWS>
static void micro8(const uint8_t* rows, const float* scales, const int8_t* panel,
                   const int32_t* start, int64_t groups, const char* next, int64_t lines,
                   vec (*acc)[NV]) {
    vec total[ROWS][NV] = {};
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t line = 0; line < lines; line++)
            __builtin_prefetch(next + (g * lines + line) * 64, 0, 2);
        ivec sum[ROWS][NV];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++) sum[r][v] = *(const ivec*)(start + g * PANEL + v * W);
        for (int64_t i = 0; i < GROUP / 4; i++) {
            const uint8_t* four = rows + (g * GROUP / 4 + i) * TILE * 4;
            const int8_t* columns = panel + (g * GROUP / 4 + i) * PANEL * 4;
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < NV; v++)
                    sum[r][v] = multiply(sum[r][v], four + r * 4, columns + v * W * 4);
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++)
                total[r][v] = fused(splat(scales[g * TILE + r]), __builtin_convertvector(sum[r][v], vec), total[r][v]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) acc[r][v] = total[r][v];
}

// `count` rows of a tile with panel `p`, without scale and bias of the columns.
static void meet8(const Linear& linear, int64_t p, const uint8_t* tile, int64_t count,
                  int64_t share, int64_t shares, vec (*acc)[NV]) {
    const int64_t groups = groups_of(linear.k), bytes = groups * GROUP * PANEL;
    const int8_t* panel = linear.weight8 + p * bytes;
    const int32_t* start = linear.start + p * groups * PANEL;
    const float* scales = (const float*)(tile + groups * GROUP * TILE);
    // Fetch a share of the next panel beside each half of the first tiles.
    const int64_t all = GROUP * PANEL / 64;
    const int64_t lines = tuning.fetch ? (all + 2 * shares - 1) / (2 * shares) : 0;
    const char* next = (const char*)panel + (p + 1 < panels(linear.n) ? bytes : 0);
    for (int64_t r = 0, half = 0; r < count; r += HALF, half++) {
        const char* own = next + std::min((share * 2 + half) * lines, all - lines) * 64 * groups;
        const uint8_t* rows = tile + r * 4;
        switch (std::min(HALF, count - r)) {
            case 1: micro8<1>(rows, scales + r, panel, start, groups, own, lines, acc + r); break;
            case 2: micro8<2>(rows, scales + r, panel, start, groups, own, lines, acc + r); break;
            case 3: micro8<3>(rows, scales + r, panel, start, groups, own, lines, acc + r); break;
            default: micro8<4>(rows, scales + r, panel, start, groups, own, lines, acc + r);
        }
    }
    for (int64_t v = 0; v < NV; v++) {
        const int64_t column = p * PANEL + v * W;
        const vec scale = load(linear.scale + column);
        const vec bias = linear.bias ? load(linear.bias + column) : (vec){};
        for (int64_t r = 0; r < count; r++) acc[r][v] = acc[r][v] * scale + bias;
    }
}

}  // namespace mor
