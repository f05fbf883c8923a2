// The two halves of a decoder layer, and the head. The plain forms are DecoderLayer.enter,
// DecoderLayer.leave and MoRModel.head.
#pragma once
#include <omp.h>

#include "gemm8.h"

namespace mor {

// One layer; a norm has one weight, or one per use of the layer. Gains, one per use, or null.
struct Layer {
    Linear query, key_value, out, gate_up, down;
    const float *input_norm, *post_norm, *query_norm, *key_norm;
    const float *attention_gain, *mlp_gain;
    int64_t norms;  // 1: one weight for all uses
    int64_t width, heads, kv_heads, head_dim, inner;
    float eps;
};

// 1 / rms of x [k].
static inline float scale_of(const float* x, int64_t k, float eps) {
    vec squares = {};
    for (int64_t i = 0; i < k; i += W) squares = fused(load(x + i), load(x + i), squares);
    return 1.0f / std::sqrt(sum(squares) / (float)k + eps);
}

static inline const float* norm_of(const float* norm, int64_t norms, const int64_t* use,
                                   int64_t row, int64_t k) {
    return norms == 1 || !use ? norm : norm + use[row] * k;
}

// Normalise this worker's share of x [m, k] into the inputs of a product.
static void norm_rows(const float* x, const float* norm, int64_t norms, const int64_t* use,
                      float eps, int64_t m, const Inputs& inputs, int64_t me, int64_t all) {
    const int64_t k = inputs.k;
    Share share(m, me, all);
    for (int64_t row = share.begin; row < share.end; row++) {
        const float* from = x + row * k;
        const float* weight = norm_of(norm, norms, use, row, k);
        const float scale = scale_of(from, k, eps);
        if (inputs.bytes) {
            float* to = inputs.rows + row * k;
            for (int64_t i = 0; i < k; i++) to[i] = weight[i] * (from[i] * scale);
            inputs.put(to, row);
        } else {
            float* to = inputs.at(row);
            for (int64_t i = 0; i < k; i++) to[i * TILE] = weight[i] * (from[i] * scale);
        }
    }
}

// Turn heads [count, d] of one token by cos and sin [d]; normalised first where there is a norm.
static void turn(float* heads, int64_t count, int64_t d, const float* cos, const float* sin,
                 const float* norm, float eps) {
    const int64_t half = d / 2;
    for (int64_t h = 0; h < count; h++) {
        float* x = heads + h * d;
        if (norm) {
            const float scale = scale_of(x, d, eps);
            for (int64_t i = 0; i < d; i++) x[i] = norm[i] * (x[i] * scale);
        }
        for (int64_t i = 0; i < half; i++) {
            const float a = x[i], b = x[half + i];
            x[i] = a * cos[i] - b * sin[i];
            x[half + i] = b * cos[half + i] + a * sin[half + i];
        }
    }
}

// query [m, heads, d], key and value side by side [with_kv, 2, kv_heads, d] of x [m, width].
static void enter(const Layer& layer, const float* x, const float* cos, const float* sin,
                  const int64_t* use, int64_t m, int64_t with_kv, float* query, float* key_value,
                  float* rows, int64_t me, int64_t all) {
    const int64_t d = layer.head_dim, keys = layer.kv_heads * d;
    const Inputs inputs(layer.query, rows, m);  // key and value are kept as the query is
    norm_rows(x, layer.input_norm, layer.norms, use, layer.eps, m, inputs, me, all);
#pragma omp barrier
    product(layer.query, inputs, m, me, all, Write{query, nullptr, layer.heads * d});
    if (with_kv)
        product(layer.key_value, inputs, with_kv, me, all, Write{key_value, nullptr, 2 * keys});
#pragma omp barrier
    Share share(m, me, all);
    for (int64_t row = share.begin; row < share.end; row++) {
        const float *c = cos + row * d, *s = sin + row * d;
        const float* norm = layer.query_norm ? norm_of(layer.query_norm, layer.norms, use, row, d) : nullptr;
        turn(query + row * layer.heads * d, layer.heads, d, c, s, norm, layer.eps);
        if (row < with_kv) {
            norm = layer.key_norm ? norm_of(layer.key_norm, layer.norms, use, row, d) : nullptr;
            turn(key_value + row * 2 * keys, layer.kv_heads, d, c, s, norm, layer.eps);
        }
    }
}

// Takes the panels of gate and up in turn; silu(gate) * up goes into the rows of what follows.
struct Gated {
    const Inputs& inputs;  // as rows where they become bytes later, else as tiles
    float* kept;           // this worker's gates: [rows][NV][W]
    void operator()(int64_t p, int64_t row, int64_t count, vec (*acc)[NV]) const {
        float* gate = kept + row * PANEL;
        if (p % 2 == 0) {
            std::memcpy(gate, acc, count * PANEL * sizeof(float));
            return;
        }
        const int64_t inner = inputs.k, first = p / 2 * PANEL, left = std::min(inner - first, PANEL);
        for (int64_t r = 0; r < count; r++) {
            float found[PANEL];
            for (int64_t v = 0; v < NV; v++)
                store(found + v * W, silu(load(gate + r * PANEL + v * W)) * acc[r][v]);
            if (inputs.bytes) {
                float* to = inputs.rows + (row + r) * inner + first;
                std::memcpy(to, found, left * sizeof(float));
            } else {
                float* to = inputs.at(row + r);
                for (int64_t c = 0; c < left; c++) to[(first + c) * TILE] = found[c];
            }
        }
    }
};

// out [m, width] from the stream x and what attention mixed [m, heads * d].
static void leave(const Layer& layer, const float* x, const float* mixed, const int64_t* use,
                  int64_t m, float* out, float* rows, float* inner_rows, float* kept, int64_t me,
                  int64_t all) {
    const Inputs attended(layer.out, rows, m);
    attended.put_all(mixed, m, me, all);
#pragma omp barrier
    product(layer.out, attended, m, me, all, Write{out, x, layer.width, layer.attention_gain, use});
#pragma omp barrier
    const Inputs normed(layer.gate_up, rows, m), inner(layer.down, inner_rows, m);
    norm_rows(out, layer.post_norm, layer.norms, use, layer.eps, m, normed, me, all);
#pragma omp barrier
    product<2>(layer.gate_up, normed, m, me, all, Gated{inner, kept});
#pragma omp barrier
    if (inner.bytes) {
        inner.put_all(inner.rows, m, me, all);
#pragma omp barrier
    }
    product(layer.down, inner, m, me, all, Write{out, out, layer.width, layer.mlp_gain, use});
}

// M rows of x [M, n] with N rows of y [N, n]: one chain each, side by side; out has `stride`.
template <int M, int N>
static inline void dot(const float* x, const float* y, int64_t n, float* out, int64_t stride) {
    int64_t i = 0;
    vec products[M][N] = {};
    for (; i + W <= n; i += W)
        for (int r = 0; r < M; r++)
            for (int j = 0; j < N; j++) products[r][j] = fused(load(x + r * n + i), load(y + j * n + i), products[r][j]);
    for (int r = 0; r < M; r++)
        for (int j = 0; j < N; j++) {
            float rest = 0;
            for (int64_t c = i; c < n; c++) rest = fused(x[r * n + c], y[j * n + c], rest);
            out[r * stride + j] = sum(products[r][j]) + rest;
        }
}

// M rows of x [M, n] with every row of y [count, n] -> out [M, count].
template <int M>
static void dots(const float* x, const float* y, int64_t count, int64_t n, float* out) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) dot<M, 4>(x, y + j * n, n, out + j, count);
    for (; j < count; j++) dot<M, 1>(x, y + j * n, n, out + j, count);
}

// Rows [begin, end) of x [., k], each with its own of the matrices [sets, outputs, k].
static void own_rows(const float* x, int64_t k, const float* weight, int64_t outputs,
                     const int64_t* index, int64_t begin, int64_t end, float* out) {
    for (int64_t row = begin; row < end;) {
        const float *from = x + row * k, *own = weight + index[row] * outputs * k;
        float* to = out + row * outputs;
        int64_t same = 1;
        while (same < 4 && row + same < end && index[row + same] == index[row]) same++;
        if (same == 4) dots<4>(from, own, outputs, k, to);
        else dots<1>(from, own, outputs, k, to), same = 1;
        row += same;
    }
}

static int64_t argmax(const float* x, int64_t n) {
    int64_t best = 0, i = 0;
    vec most = splat(-INFINITY);
    for (; i + W <= n; i += W) {
        const vec found = load(x + i);
        most = found > most ? found : most;
    }
    float top = -INFINITY;
    for (int64_t lane = 0; lane < W; lane++) top = std::max(top, most[lane]);
    for (; i < n; i++) top = std::max(top, x[i]);
    while (best < n && x[best] != top) best++;
    return best < n ? best : 0;
}

}  // namespace mor
