// A tile of rows meets a panel of weights, as floats or as halves: the innermost loops of products.
#pragma once
#include <vector>

#include "vec.h"

namespace mor {

static inline vec above(ivec pair) {
    const ivec bits = pair & (int32_t)0xffff0000;
    vec found;
    std::memcpy(&found, &bits, sizeof(vec));
    return found;
}
static inline vec below(ivec pair) {
    const ivec bits = pair << 16;
    vec found;
    std::memcpy(&found, &bits, sizeof(vec));
    return found;
}

// Cache lines that a panel has for each step of a product: an input, or two of halves.
constexpr int64_t LINES = PANEL * 4 / LINE;

// What of the next panel is fetched while a tile meets this one: `lines` beside every `every`-th step.
// Fetched faster than memory gives them, they would hold up the tile.
struct Fetch {
    const char* next;
    int64_t lines, every;
};

// The lines of step i, FETCHED beside each that fetches any.
template <int FETCHED>
static inline __attribute__((always_inline)) void fetch_step(const char*& next, int64_t i, int64_t every) {
    if (FETCHED == 0 || (LINES == 1 && (i & (every - 1)))) return;
    for (int line = 0; line < FETCHED; line++) __builtin_prefetch(next + line * LINE, 0, 2);
    next += FETCHED * LINE;
}

template <int ROWS>
static inline __attribute__((always_inline)) void add_step(const float* rows, const vec* b,
                                                           vec (*a)[NV]) {
    for (int r = 0; r < ROWS; r++) {
        const vec x = splat(rows[r]);
        for (int v = 0; v < NV; v++) a[r][v] = fused(x, b[v], a[r][v]);
    }
}

// acc += rows^T panel, for ROWS rows of a tile.
template <int ROWS, int FETCHED>
static void micro(const float* __restrict rows, const float* __restrict panel, int64_t k,
                  Fetch fetch, vec (*acc)[NV]) {
    vec a[ROWS][NV];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) a[r][v] = acc[r][v];
    for (int64_t i = 0; i < k; i++) {
        fetch_step<FETCHED>(fetch.next, i, fetch.every);
        vec b[NV];
        for (int v = 0; v < NV; v++) b[v] = load(panel + i * PANEL + v * W);
        add_step<ROWS>(rows + i * TILE, b, a);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) acc[r][v] = a[r][v];
}

template <int ROWS, int FETCHED>
static void micro(const float* __restrict rows, const int32_t* __restrict panel, int64_t k,
                  Fetch fetch, vec (*acc)[NV]) {
    vec a[ROWS][NV];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) a[r][v] = acc[r][v];
    int64_t i = 0;
    for (; i < k / 2; i++) {
        fetch_step<FETCHED>(fetch.next, i, fetch.every);
        const int32_t* at = panel + i * PANEL;
        vec b[NV];
        for (int v = 0; v < NV; v++) b[v] = above(*(const ivec*)(at + v * W));
        add_step<ROWS>(rows + 2 * i * TILE, b, a);
        // Read again, not kept: AVX2 has too few registers.
        if constexpr (W < 16) asm volatile("" : "+r"(at));
        for (int v = 0; v < NV; v++) b[v] = below(*(const ivec*)(at + v * W));
        add_step<ROWS>(rows + (2 * i + 1) * TILE, b, a);
    }
    if (k % 2) {
        vec b[NV];
        for (int v = 0; v < NV; v++) b[v] = above(*(const ivec*)(panel + i * PANEL + v * W));
        add_step<ROWS>(rows + 2 * i * TILE, b, a);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) acc[r][v] = a[r][v];
}

template <class T>
static void micro_any(int64_t count, const Fetch& fetch, const float* rows, const T* panel,
                      int64_t k, vec (*acc)[NV]) {
    with_count<TILE>(count, [&](auto high) {
        if (fetch.lines == 0) return micro<high(), 0>(rows, panel, k, fetch, acc);
        with_count<LINES>(fetch.lines, [&](auto n) { micro<high(), n()>(rows, panel, k, fetch, acc); });
    });
}

// A panel of halves as floats, in this thread's own room.
static const float* widen(const int32_t* panel, int64_t k) {
    static thread_local std::vector<float> room;
    const int64_t size = (k + 1) * PANEL + LINE / 4;
    if ((int64_t)room.size() < size) room.resize(size);
    float* to = (float*)(((uintptr_t)room.data() + LINE - 1) & -(uintptr_t)LINE);
    for (int64_t i = 0; i < k; i += 2, panel += PANEL)
        for (int64_t v = 0; v < NV; v++) {
            const ivec pair = *(const ivec*)(panel + v * W);
            store(to + i * PANEL + v * W, above(pair));
            store(to + (i + 1) * PANEL + v * W, below(pair));
        }
    return to;
}
constexpr int64_t WIDEN = 8;  // from so many tiles on it takes less than each tile's own steps

}  // namespace mor
