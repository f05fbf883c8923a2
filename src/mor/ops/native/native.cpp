// The functions that mor.ops.native calls. All of them share work out over `threads` OpenMP threads;
// the pool of threads is PyTorch's own.
#include "attention.h"
#include "flash_backward.h"
#include "layer.h"
#include "machine.h"
#include "pass.h"

using namespace mor;

extern "C" {

// What the caller has to know to allocate: columns of a panel, rows of a tile.
void mor_shape(int64_t* panel, int64_t* tile) { *panel = PANEL, *tile = TILE; }

void mor_tune(int64_t rows_bytes, int64_t fetch) { tuning = {rows_bytes, fetch}; }

void mor_pack(const float* weight, int64_t n, int64_t k, float* out) { pack(weight, n, k, out); }

// Weights that bfloat16 holds exactly.
void mor_pack16(const float* weight, int64_t n, int64_t k, int32_t* out) {
    pack16(weight, n, k, out);
}

void mor_pack8(const float* weight, int64_t n, int64_t k, int8_t* out, float* scale,
               int32_t* start) {
    pack8(weight, n, k, out, scale, start);
}

void mor_linear(const Linear* linear, const float* x, int64_t m, float* out, float* rows,
                int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const Inputs inputs(*linear, rows, m);
        inputs.put_all(x, m, me, all);
#pragma omp barrier
        product(*linear, inputs, m, me, all, Write{out, nullptr, linear->n});
    }
}

void mor_head(const Linear* linear, const float* norm, float eps, const float* x, int64_t m,
              float* out, float* rows, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        const Inputs inputs(*linear, rows, m);
        norm_rows(x, norm, 1, nullptr, eps, m, inputs, me, all);
#pragma omp barrier
        product(*linear, inputs, m, me, all, Write{out, nullptr, linear->n});
    }
}

void mor_enter(const Layer* layer, const float* x, const float* cos, const float* sin,
               const int64_t* use, int64_t m, int64_t with_kv, float* query, float* key_value,
               float* rows, int threads) {
#pragma omp parallel num_threads(threads)
    enter(*layer, x, cos, sin, use, m, with_kv, query, key_value, rows, omp_get_thread_num(),
          omp_get_num_threads());
}

void mor_leave(const Layer* layer, const float* x, const float* mixed, const int64_t* use,
               int64_t m, float* out, float* rows, float* inner_rows, float* kept, int threads) {
    const int64_t room = tiles(m) * TILE * PANEL;
#pragma omp parallel num_threads(threads)
    leave(*layer, x, mixed, use, m, out, rows, inner_rows, kept + omp_get_thread_num() * room,
          omp_get_thread_num(), omp_get_num_threads());
}

void mor_attend(const Ragged* batch, int64_t layer, int64_t heads, const float* query,
                const float* key, const float* value, int64_t stride, int64_t writes, float* out,
                int threads) {
    const std::vector<Item> items = items_of(*batch, threads);
#pragma omp parallel num_threads(threads)
    attend(*batch, items, layer, heads, query, key, value, stride, writes, out, omp_get_thread_num(),
           omp_get_num_threads());
}

void mor_flash(const Flash* how, int threads) {
    const std::vector<Job> jobs = jobs_of(*how, nullptr);
    const int64_t many = (int64_t)jobs.size();
#pragma omp parallel num_threads(threads)
    {
        static thread_local Room room;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < many; i++) flash_forward(*how, jobs[i], room);
    }
}

// Gradients of keys and values hold zeros before.
void mor_flash_backward(const Flash* how, const FlashGradients* to, int threads) {
    std::vector<float> partial;
    const std::vector<Job> jobs = jobs_of(*how, &partial);
    const int64_t many = (int64_t)jobs.size();
    const int64_t shared = partial.empty() ? 0 : how->count * how->kv_heads;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Room room;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < many; i++) flash_backward(*how, *to, jobs[i], room);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < shared; i++)
            add_up(*how, *to, jobs, i / how->kv_heads, i % how->kv_heads);
    }
}

// Layers in a row over x [m, width], in place; layer i has the table's layer `first` + i.
void mor_stack(const Layer* const* layers, int64_t count, const Ragged* batch, int64_t first,
               float* x, const float* cos, const float* sin, const int64_t* use, int64_t m,
               int64_t with_kv, float* query, float* key_value, float* mixed, float* rows,
               float* inner_rows, float* kept, int threads) {
    const std::vector<Item> items = items_of(*batch, threads);
    const int64_t room = tiles(m) * TILE * PANEL;
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t i = 0; i < count; i++) {
            const Layer& layer = *layers[i];
            const int64_t keys = layer.kv_heads * layer.head_dim;
            enter(layer, x, cos, sin, use, m, with_kv, query, key_value, rows, me, all);
#pragma omp barrier
            attend(*batch, items, first + i, layer.heads, query, key_value, key_value + keys,
                   2 * keys, with_kv, mixed, me, all);
            leave(layer, x, mixed, use, m, x, rows, inner_rows, kept + me * room, me, all);
#pragma omp barrier
        }
    }
}

// The same as a stage over the tokens whose columns lie in `flat`; `batch` has the pages. `index` says
// where their streams come from: null for their lanes. `goes` is null where nothing goes to lanes.
void mor_pass(const Pass* pass, const Layer* const* layers, int64_t count, const Ragged* batch,
              const int64_t* flat, int64_t m, int64_t pieces, int64_t with_kv, int own_use,
              const int64_t* index, float* x, float* cos, float* sin, float* query, float* key_value,
              float* mixed, float* rows, float* inner_rows, float* kept, uint8_t* goes, int threads) {
    const Columns at(flat, m, pieces);
    Ragged own = *batch;
    own.own_rows = at.own_row, own.written = at.written, own.slots = at.slot;
    own.rows = at.row, own.counts = at.size, own.pieces = pieces;
    if (own.origins) own.own = at.own, own.lengths = at.length;
    gather(*pass, at, index ? index : at.lane, m, x, cos, sin);
    mor_stack(layers, count, &own, pass->first, x, cos, sin, own_use ? at.depth : nullptr, m, with_kv,
              query, key_value, mixed, rows, inner_rows, kept, threads);
    if (goes) settle(*pass, at, m, x, goes);
}

// Entries of tokens as they ended, in every layer of a stage; no layer is run. The columns are those of
// mor_pass: where streams come from, which norms, and where entries go.
void mor_entries(const Pass* pass, const Layer* const* layers, int64_t count, const Ragged* batch,
                 const int64_t* flat, int64_t m, int own_use, float* x, float* cos, float* sin,
                 float* query, float* key_value, float* rows, int threads) {
    const Columns at(flat, m, 0);
    gather(*pass, at, at.lane, m, x, cos, sin);
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t i = 0; i < count; i++) {
            const Layer& layer = *layers[i];
            const int64_t keys = layer.kv_heads * layer.head_dim;
            enter(layer, x, cos, sin, own_use ? at.depth : nullptr, m, m, query, key_value, rows, me, all);
#pragma omp barrier
            write_entries(batch->pages, pass->first + i, key_value, key_value + keys, 2 * keys, at.own_row,
                          at.written, m, me, all);
#pragma omp barrier
        }
    }
}

// out [m, outputs]: row i of x [m, k] with its own of the matrices [sets, outputs, k].
void mor_own_linear(const float* x, int64_t m, int64_t k, const float* weight, int64_t outputs,
                    const int64_t* index, float* out, int threads) {
    const int shared = m * outputs * k < (1 << 16) ? 1 : threads;
#pragma omp parallel num_threads(shared)
    {
        Share share(m, omp_get_thread_num(), omp_get_num_threads());
        own_rows(x, k, weight, outputs, index, share.begin, share.end, out);
    }
}

// What the machine does at best: `steps` x 24 x 16 fused multiply-adds on each thread, and reading
// x [n] once, a share on each thread. The result is of no use.
float mor_spin(int64_t steps, int threads) {
    float all = 0;
#pragma omp parallel num_threads(threads) reduction(+ : all)
    all += spin(steps);
    return all;
}

float mor_read(const float* x, int64_t n, int threads) {
    float all = 0;
#pragma omp parallel num_threads(threads) reduction(+ : all)
    {
        Share share(n / (8 * W), omp_get_thread_num(), omp_get_num_threads());
        all += read_all(x + share.begin * 8 * W, (share.end - share.begin) * 8 * W);
    }
    return all;
}

// Answers of a router about x [m, k], each of m tokens at its own depth.
void mor_route(const Router* router, const float* x, int64_t m, int64_t k, const int64_t* depths,
               float* logits, float* gates, uint8_t* goes) {
    route(*router, x, m, k, depths, logits, gates, goes);
}

// out [n]: function `kind` of each number of x [n].
void mor_pointwise(const float* x, int64_t n, int kind, float* out, int threads) {
    const int64_t vectors = (n + W - 1) / W;
    const int shared = vectors < 512 ? 1 : threads;
#pragma omp parallel for num_threads(shared) schedule(static)
    for (int64_t i = 0; i < vectors; i++) pointwise_at(kind, x, n, i * W, out);
}

// Place of the largest of each row of x [m, n]; the first of equals.
void mor_argmax(const float* x, int64_t m, int64_t n, int64_t* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t row = 0; row < m; row++) out[row] = argmax(x + row * n, n);
}

}  // extern "C"
