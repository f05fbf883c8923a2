// Products of a few rows with a large matrix that is packed into panels of PANEL columns.
//
// A panel lies in memory as [inputs][PANEL]; the rows as tiles [inputs][TILE]. Every output is one
// chain of fused multiply-adds over the inputs in order, whatever the number of rows: a row's
// result does not depend on the rows beside it, to the last bit.
//
// Reading the weights is what bounds a batch of tens of rows, so that while the tiles meet one
// panel, the next panel is fetched into the second-level cache, a share by each tile.
//
// Weights that bfloat16 holds exactly, as those of most published checkpoints, are kept so: half as
// much to read. They are floats again before anything is multiplied, so that results are those of
// floats to the last bit.
#pragma once
#include <algorithm>
#include <vector>

#include "micro.h"

namespace mor {

// Number of panels for `n` columns.
static inline int64_t panels(int64_t n) { return (n + PANEL - 1) / PANEL; }
static inline int64_t tiles(int64_t m) { return (m + TILE - 1) / TILE; }

// A share [begin, end) of `count` items for worker `me` of `all`.
struct Share {
    int64_t begin, end;
    Share(int64_t count, int64_t me, int64_t all)
        : begin(count * me / all), end(count * (me + 1) / all) {}
};

// Pack weight [n, k] (as a Linear has it) into panels; columns beyond n are zero.
static void pack(const float* weight, int64_t n, int64_t k, float* out) {
    for (int64_t p = 0; p < panels(n); p++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t c = 0; c < PANEL; c++) {
                int64_t column = p * PANEL + c;
                *out++ = column < n ? weight[column * k + i] : 0.0f;
            }
}

// The upper half of a float that has nothing in the lower one: bfloat16.
static inline uint32_t half_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 16;
}

// The same of weights that bfloat16 holds exactly: those of two inputs in one number, the first above,
// since two such become floats by one step each. A panel lies in memory as [pairs][PANEL].
static void pack16(const float* weight, int64_t n, int64_t k, int32_t* out) {
    for (int64_t p = 0; p < panels(n); p++)
        for (int64_t i = 0; i < k; i += 2)
            for (int64_t c = 0; c < PANEL; c++) {
                const int64_t column = p * PANEL + c;
                const float* at = weight + column * k + i;
                const uint32_t above = column < n ? half_of(at[0]) : 0;
                const uint32_t below = column < n && i + 1 < k ? half_of(at[1]) : 0;
                *out++ = (int32_t)(above << 16 | below);
            }
}

// How m rows are shared out to tiles. Evenly, since a tile of one or two rows takes as long as one of
// four: its few sums wait for themselves. Rows of bytes fill the tiles, whose halves they meet by.
struct Tiling {
    int64_t m, count;
    bool full;
    Tiling(int64_t m, bool full) : m(m), count(tiles(m)), full(full) {}
    int64_t first(int64_t tile) const { return full ? std::min(m, tile * TILE) : m * tile / count; }
    int64_t tile_of(int64_t row) const { return full ? row / TILE : ((row + 1) * count - 1) / m; }
};

// A Linear, packed.
struct Linear {
    const float* weight;   // panels, or null for those of bytes or halves
    const float* bias;     // [panels * PANEL], or null
    int64_t n, k;          // outputs, inputs
    const int8_t* weight8;  // see gemm8.h
    const float* scale;
    const int32_t* start;
    const int32_t* weight16;  // see pack16
};

static int64_t tile_bytes(int64_t k);
static void put_bytes(const float* from, int64_t row, int64_t k, uint8_t* bytes);
static void meet8(const Linear& linear, int64_t p, const uint8_t* tile, int64_t count,
                  int64_t share, int64_t shares, vec (*acc)[NV]);

// Room for the m rows that a product takes, and how they lie there: as tiles of floats; where weights
// are bytes, as tiles of bytes, and before these there is room for the rows as they are.
struct Inputs {
    float* rows;
    uint8_t* bytes;  // null where weights are no bytes
    int64_t k;
    Tiling tiling;
    Inputs(const Linear& linear, float* room, int64_t m)
        : rows(room), k(linear.k), tiling(m, linear.weight8) {
        bytes = linear.weight8 ? (uint8_t*)(room + tiles(m) * TILE * k) : nullptr;
    }
    // Where the first number of a row lies in its tile; the next is TILE further.
    float* at(int64_t row) const {
        const int64_t tile = tiling.tile_of(row);
        return rows + tile * TILE * k + row - tiling.first(tile);
    }
    void put(const float* from, int64_t row) const {
        if (bytes) return put_bytes(from, row, k, bytes);
        float* to = at(row);
        for (int64_t i = 0; i < k; i++) to[i * TILE] = from[i];
    }
    // This worker's share of x [m, k].
    void put_all(const float* x, int64_t m, int64_t me, int64_t all) const {
        Share share(m, me, all);
        for (int64_t row = share.begin; row < share.end; row++) put(x + row * k, row);
    }
};

// Shares out the `total` lines of the next panel to the tiles of this one, which do `steps` each.
class Fetching {
    const char* next;
    int64_t total, steps, every = 1, fetched = 0;

  public:
    Fetching(const char* next, int64_t total, int64_t steps, int64_t tiles)
        : next(next), total(total), steps(steps) {
        while (LINES == 1 && every < 8 && total * every * 2 <= tiles * steps) every *= 2;
    }
    Fetch share(int64_t left) {
        const int64_t missing = std::max<int64_t>(0, total - fetched);
        int64_t lines = missing > 0;
        if constexpr (LINES > 1)
            lines = std::min(LINES, (missing + left * steps - 1) / (left * steps));
        const Fetch found = {next + fetched * LINE, lines, every};
        fetched += lines * (steps / every);
        return found;
    }
};

// What is chosen by measuring on the processor at hand (tuning.py). No choice moves a bit: every
// output stays the same chain.
struct Tuning {
    int64_t rows_bytes = 768 << 10;  // of rows that meet one panel before the next
    int64_t fetch = 1;               // whether the next panel is fetched
};
static Tuning tuning;

// Tiles that meet one panel before the next: as many rows as stay in the second-level cache.
static inline int64_t tiles_at_once(int64_t k) {
    int64_t fit = tuning.rows_bytes / (k * TILE * (int64_t)sizeof(float));
    return fit < 4 ? 4 : fit;
}

// This worker's share of rows x panels; UNIT neighbouring panels stay together.
// `sink(panel, row, rows, acc)` takes each finished tile of the first m rows, from `row` on.
template <int UNIT = 1, class Sink>
static void product(const Linear& linear, const Inputs& inputs, int64_t m, int64_t me, int64_t all,
                    Sink sink) {
    if (m == 0) return;
    const float* rows = inputs.rows;
    const uint8_t* bytes = inputs.bytes;
    const Tiling& tiling = inputs.tiling;
    const int64_t k = linear.k, width = k * PANEL, high = tiling.tile_of(m - 1) + 1;
    const int64_t steps = linear.weight16 ? (k + 1) / 2 : k;
    const int64_t count = panels(linear.n), units = count / UNIT;
    const int64_t most = tiles_at_once(k);
    int64_t groups = (high + most - 1) / most;
    // Too few panels for the workers: groups of rows are shared out beside them.
    const bool wide = units >= 2 * all || high == 1;
    while (!wide && units * groups < 2 * all && groups < high) groups++;
    Share share(wide ? units : units * groups, me, all);
    for (int64_t pass = 0; pass < (wide ? groups : 1); pass++)
        for (int64_t item = share.begin; item < share.end; item++) {
            const int64_t unit = wide ? item : item / groups, group = wide ? pass : item % groups;
            const int64_t first = high * group / groups, last = high * (group + 1) / groups;
            for (int64_t p = unit * UNIT; p < (unit + 1) * UNIT; p++) {
                const float* panel = linear.weight ? linear.weight + p * width : nullptr;
                const int32_t* pairs = linear.weight16 ? linear.weight16 + p * steps * PANEL : nullptr;
                const char* here = pairs ? (const char*)pairs : (const char*)panel;
                const char* next = here + (p + 1 < count ? steps * PANEL * 4 : 0);
                if (pairs && last - first >= WIDEN) panel = widen(pairs, k);
                Fetching fetching(next, tuning.fetch && !bytes ? steps * LINES : 0, panel ? k : steps,
                                  last - first);
                for (int64_t tile = first; tile < last; tile++) {
                    const int64_t row = tiling.first(tile);
                    const int64_t high_rows = std::min(m, tiling.first(tile + 1)) - row;
                    alignas(64) vec acc[TILE][NV];
                    if (bytes) {
                        meet8(linear, p, bytes + tile * tile_bytes(k), high_rows, tile - first,
                              last - first, acc);
                        sink(p, row, high_rows, acc);
                        continue;
                    }
                    for (int64_t r = 0; r < high_rows; r++)
                        for (int64_t v = 0; v < NV; v++)
                            acc[r][v] = linear.bias ? load(linear.bias + p * PANEL + v * W) : (vec){};
                    const float* own = rows + tile * TILE * k;
                    const Fetch fetch = fetching.share(last - tile);
                    if (panel) micro_any(high_rows, fetch, own, panel, k, acc);
                    else micro_any(high_rows, fetch, own, pairs, k, acc);
                    sink(p, row, high_rows, acc);
                }
            }
        }
}

// Write finished tiles to out [m, n], each row times its own of the gains [uses, n] where there are
// any, added to `base` where there is one.
struct Write {
    float* out;
    const float* base;
    int64_t n;
    const float* gains = nullptr;
    const int64_t* use = nullptr;
    void operator()(int64_t p, int64_t first, int64_t count, vec (*acc)[NV]) const {
        for (int64_t r = 0; r < count; r++) {
            const int64_t row = first + r;
            if (gains) {  // their width is a multiple of W
                const float* gain = gains + (use ? use[row] * n : 0) + p * PANEL;
                for (int64_t v = 0; v < NV && p * PANEL + v * W < n; v++)
                    acc[r][v] *= load(gain + v * W);
            }
            for (int64_t v = 0; v < NV; v++) {
                const int64_t column = p * PANEL + v * W, left = n - column;
                if (left <= 0) break;
                float* to = out + row * n + column;
                if (left >= W) {
                    store(to, base ? load(base + row * n + column) + acc[r][v] : acc[r][v]);
                } else {
                    float f[W];
                    store(f, acc[r][v]);
                    for (int64_t c = 0; c < left; c++)
                        to[c] = base ? base[row * n + column + c] + f[c] : f[c];
                }
            }
        }
    }
};

}  // namespace mor
