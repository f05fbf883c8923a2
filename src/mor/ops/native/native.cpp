// The functions that mor.ops.native calls. All of them share work out over `threads` OpenMP threads;
// the pool of threads is PyTorch's own.
#include "attention.h"
#include "layer.h"

using namespace mor;

extern "C" {

// What the caller has to know to allocate: columns of a panel, rows of a tile.
void mor_shape(int64_t* panel, int64_t* tile) { *panel = PANEL, *tile = TILE; }

void mor_pack(const float* weight, int64_t n, int64_t k, float* out) { pack(weight, n, k, out); }

void mor_linear(const Linear* linear, const float* x, int64_t m, float* out, float* rows,
                int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        Share share(m, me, all);
        for (int64_t row = share.begin; row < share.end; row++)
            put_row(x + row * linear->k, row, linear->k, rows);
#pragma omp barrier
        product(*linear, rows, m, me, all, Write{out, nullptr, linear->n});
    }
}

void mor_head(const Linear* linear, const float* norm, float eps, const float* x, int64_t m,
              float* out, float* rows, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        norm_rows(x, norm, 1, nullptr, eps, m, linear->k, rows, me, all);
#pragma omp barrier
        product(*linear, rows, m, me, all, Write{out, nullptr, linear->n});
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

// query [N, heads, d] -> out. Token t < writes leaves key + t * stride, value + t * stride
// [kv_heads, d] at place written[t] of table row own_rows[t]; a token of piece s reads places
// 0..slots[t] of row rows[s].
void mor_attend(const Pages* pages, int64_t layer, int64_t heads, const float* query,
                const float* key, const float* value, int64_t stride, int64_t writes,
                const int64_t* own_rows,
                const int64_t* written, const int64_t* rows, const int64_t* counts, int64_t pieces,
                const int64_t* slots, float* out, int threads) {
    static thread_local std::vector<Item> items;
    items.clear();
    int64_t token = 0;
    for (int64_t s = 0; s < pieces; s++)
        for (int64_t end = token + counts[s]; token < end;) {
            const int64_t count = std::min(QUERIES, end - token);
            for (int64_t head = 0; head < pages->kv_heads; head++)
                items.push_back({rows[s], token, count, head});
            token += count;
        }
    const std::vector<Item>& all_items = items;
    const int64_t many = (int64_t)all_items.size();
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> room;
        if (writes) {
            write_entries(*pages, layer, key, value, stride, own_rows, written, writes,
                          omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t i = 0; i < many; i++)
            attend_any(*pages, all_items[i], layer, query, slots, heads, out, room);
    }
}

}  // extern "C"
