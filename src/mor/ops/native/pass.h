// A stage over tokens in flight. Streams come from lanes or are embeddings; what the layers make of
// them goes to the lanes by the router's update, and the router says who goes on. The plain forms are
// Runner._start, _run and _finish, update_stream and BoundaryRouter.answer.
#pragma once
#include "attention.h"
#include "layer.h"
#include "pointwise.h"

namespace mor {

// Answers of a router that compares a score with a boundary, by depth; without `weight`, of one that
// lets all go on.
struct Router {
    const float *weight, *bias, *boundary;
    const uint8_t* full;  // whether a depth lets all through
    int64_t depths;
    int at_it, kind;  // kind as of pointwise.h, below 0 none
    float shift, alpha;
};

struct Pass {
    const float* source;     // [., width] rows that streams come from
    float *lanes, *gates;    // [., width] where they go and [.] the last answers' gates; or null
    const float *cos, *sin;  // [places, turn]
    int64_t width, turn;
    int64_t first;  // the page table's layer of the first layer
    int64_t ahead;  // which depth is asked about: so many behind that of the token
    int rule;       // of the update, see Rule
    Router router;
};
enum Rule { LAST, ADDITIVE, GATED, RESIDUAL };

// Logits x w[depth] + bias, gates squash(logit + shift) alpha, and whether each of the m tokens, each
// at its own depth, goes on: above its boundary (or at it), or where its depth is full.
static void route(const Router& router, const float* x, int64_t m, int64_t k, const int64_t* depths,
                  float* logits, float* gates, uint8_t* goes) {
    own_rows(x, k, router.weight, 1, depths, 0, m, logits);
    for (int64_t i = 0; i < m; i++) {
        if (router.bias) logits[i] += router.bias[depths[i]];
        const float limit = router.boundary[depths[i]];
        goes[i] = (router.at_it ? logits[i] >= limit : logits[i] > limit) || router.full[depths[i]];
        gates[i] = logits[i] + router.shift;
    }
    if (router.kind < 0) return;
    for (int64_t i = 0; i < m; i += W) pointwise_at(router.kind, gates, m, i, gates);
    for (int64_t i = 0; i < m; i++) gates[i] *= router.alpha;
}

// The stream h [k] of one token becomes what `rule` makes of it, the block's output y and gate g.
// Each step is rounded by itself, as in the plain form: no product is added in one step.
static void update(int rule, float* h, float* y, float g, int64_t k) {
    if (rule == LAST) {
        std::memcpy(h, y, k * sizeof(float));
        return;
    }
    if (rule == RESIDUAL)
        for (int64_t i = 0; i < k; i++) y[i] -= h[i];
    asm volatile("" ::: "memory");
    if (rule != ADDITIVE)
        for (int64_t i = 0; i < k; i++) y[i] *= g;
    asm volatile("" ::: "memory");
    for (int64_t i = 0; i < k; i++) h[i] += y[i];
}

// The columns of the tokens and pieces of a batch end to end, as TokenColumns and PieceColumns have them.
struct Columns {
    const int64_t *position, *depth, *limit, *slot, *written, *lane, *own_row;
    const int64_t *row, *size, *own, *length;
    Columns(const int64_t* flat, int64_t m, int64_t pieces) {
        position = flat, depth = flat + m, limit = flat + 2 * m, slot = flat + 3 * m;
        written = flat + 4 * m, lane = flat + 5 * m, own_row = flat + 6 * m;
        row = flat + 7 * m, own = row + 2 * pieces, length = row + 3 * pieces, size = row + 4 * pieces;
    }
};

// What enters: rows `index` [m] of the source as x [m, width], and cos and sin [m, turn].
static void gather(const Pass& pass, const Columns& at, const int64_t* index, int64_t m, float* x,
                   float* cos, float* sin) {
    const int64_t width = pass.width, turn = pass.turn;
    for (int64_t i = 0; i < m; i++) {
        std::memcpy(x + i * width, pass.source + index[i] * width, width * sizeof(float));
        std::memcpy(cos + i * turn, pass.cos + at.position[i] * turn, turn * sizeof(float));
        std::memcpy(sin + i * turn, pass.sin + at.position[i] * turn, turn * sizeof(float));
    }
}

// The layers' output x [m, width] goes to the lanes, and each token is asked about a depth.
static void settle(const Pass& pass, const Columns& at, int64_t m, float* x, uint8_t* goes) {
    static thread_local std::vector<float> found;
    static thread_local std::vector<int64_t> asked;
    const int64_t width = pass.width;
    for (int64_t i = 0; i < m; i++) {
        float* stream = pass.lanes + at.lane[i] * width;
        update(pass.rule, stream, x + i * width, pass.gates ? pass.gates[at.lane[i]] : 1, width);
        if (pass.rule != LAST) std::memcpy(x + i * width, stream, width * sizeof(float));
    }
    if (pass.router.weight) {
        found.resize(2 * m), asked.resize(m);
        // Tokens at their cap are asked about too, at the last depth; the cap decides for them.
        for (int64_t i = 0; i < m; i++)
            asked[i] = std::min(at.depth[i] + pass.ahead, pass.router.depths - 1);
        route(pass.router, x, m, width, asked.data(), found.data(), found.data() + m, goes);
        for (int64_t i = 0; i < m && pass.gates; i++) pass.gates[at.lane[i]] = found[m + i];
    }
    for (int64_t i = 0; i < m; i++)
        goes[i] = (!pass.router.weight || goes[i]) && at.depth[i] + pass.ahead < at.limit[i];
}

}  // namespace mor
