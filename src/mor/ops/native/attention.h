// Attention of ragged virtual sequences over the paged pool. The plain form is
// mor.engine.attend.padded_attention.
#pragma once
#include <algorithm>
#include <vector>

#include "entries.h"
#include "gemm.h"

namespace mor {

// Tokens of a batch: token t is written to place written[t] of table row own_rows[t]; the pieces
// they lie in, one after the other, read places 0..slots[t] of row rows[s]. Where there are origins
// [rows, width], a piece reads place origins[own[s]][i] from place i of row own[s] instead, for
// each of the lengths[s] places of that row.
struct Ragged {
    Pages pages;
    const int64_t *own_rows, *written, *slots, *rows, *counts;
    int64_t pieces;
    const int64_t *own, *lengths, *origins;
    int64_t width;
};

// `count` queries of one piece that follow each other, for the heads of keys `head` to `last`.
constexpr int64_t QUERIES = 8;
struct Item {
    int64_t piece, first, count, head, last;
};

// Where the entries lie that an item reads, as distances from the first one of the pool.
static void find_entries(const Ragged& batch, const Item& item, int64_t layer, int64_t reach,
                         std::vector<int64_t>& found) {
    const Pages& pages = batch.pages;
    const int64_t stride = pages.kv_heads * pages.head_dim, row = batch.rows[item.piece];
    const int64_t* at = pages.table + (row * pages.layers + layer) * pages.columns;
    if ((int64_t)found.size() < reach) found.resize(reach);
    for (int64_t begin = 0; begin < reach; begin += pages.page_size, at++) {
        const int64_t count = std::min(reach - begin, pages.page_size);
        for (int64_t j = 0; j < count; j++)
            found[begin + j] = (*at * pages.page_size + j) * stride;
    }
    if (!batch.origins || batch.own[item.piece] == row) return;
    const int64_t own = batch.own[item.piece], *origins = batch.origins + own * batch.width;
    for (int64_t i = 0; i < batch.lengths[item.piece] && origins[i] < reach; i++)
        found[origins[i]] = pages.slot(own, layer, i) * stride;
}

// Of every two groups of SIZE lanes the first (FROM 0) or the second (FROM SIZE), of one vector and
// the next in turn.
template <int SIZE, int FROM>
struct Groups {
    static constexpr int of(int i) { return FROM + (i & SIZE ? W + i - SIZE : i); }
};

// Lane i of the result is the sum of parts[i]: every pair of vectors becomes one, log2(W) times.
template <int SIZE = W / 2>
static inline vec sums(const vec* parts) {
    if constexpr (SIZE == 0) {
        return parts[0];
    } else {
        vec half[SIZE];
        for (int i = 0; i < SIZE; i++)
            half[i] = pick<Groups<SIZE, 0>>(parts[i], parts[i + SIZE]) +
                      pick<Groups<SIZE, SIZE>>(parts[i], parts[i + SIZE]);
        return sums<SIZE / 2>(half);
    }
}

constexpr int64_t AHEAD = 16;

// Up to W entries at a time: visit(begin, count, where they lie), while those AHEAD of them are fetched
// from `store` into the cache.
template <class E, class Visit>
static inline void runs(const Pages& pages, const E* store, const Item& item, const int64_t* entries,
                        int64_t reach, Visit visit) {
    const int64_t lines = (item.last - item.head) * pages.head_dim * (int64_t)sizeof(E) / 64;
    for (int64_t begin = 0; begin < reach; begin += W) {
        const int64_t next = std::min(begin + AHEAD + W, reach);
        for (int64_t e = begin + AHEAD; e < next; e++) {
            const char* from = (const char*)(store + entries[e] + item.head * pages.head_dim);
            for (int64_t line = 0; line < lines; line++)
                __builtin_prefetch(from + line * 64, 0, 3);
        }
        visit(begin, std::min(W, reach - begin), entries + begin);
    }
}

// scores[q][j] = query q . key j of the queries' own head of keys, `group` queries a head.
template <class E, int ND>
static void score_rows(const Pages& pages, const Item& item, const int64_t* entries,
                       const float* query, int64_t per_head, int64_t reach, int64_t width,
                       float* scores) {
    constexpr int64_t d = ND * W;
    const E* keys = (const E*)pages.keys;
    runs(pages, keys, item, entries, reach, [&](int64_t begin, int64_t count, const int64_t* at) {
        for (int64_t head = item.head; head < item.last; head++) {
            const E* key = keys + head * d;
            [[maybe_unused]] vec scale;
            if constexpr (std::is_same_v<E, int8_t>)
                scale = scales_of<d>(pages.key_scales + head, at, count);
            for (int64_t i = 0; i < per_head; i++) {
                const int64_t q = (head - item.head) * per_head + i;
                vec own[ND], parts[W] = {};
                for (int v = 0; v < ND; v++) own[v] = load(query + q * d + v * W);
                for (int64_t j = 0; j < count; j++) {
                    const E* one = key + at[j];
                    vec found = own[0] * load(one);
                    for (int v = 1; v < ND; v++) found = fused(own[v], load(one + v * W), found);
                    parts[j] = found;
                }
                vec found = sums(parts);
                if constexpr (std::is_same_v<E, int8_t>) found *= scale;
                if (count == W) store(scores + q * width + begin, found);
                else std::memcpy(scores + q * width + begin, &found, count * sizeof(float));
            }
        }
    });
}

// out[q] += sum over a run of chances[q][j] value j, for N queries: as many numbers of a value at a time
// as there are registers for.
template <class E, int ND, int N>
static inline void mix_run(const E* value, const int64_t* at, int64_t count, const float* chances,
                           int64_t width, float* out, [[maybe_unused]] const vec& scale) {
    constexpr int64_t d = ND * W;
    constexpr int C = W == 16 ? ND : N < 4 && ND % 4 == 0 ? 4 : 2;
    for (int64_t from = 0; from < d; from += C * W) {
        vec acc[N][C];
        for (int q = 0; q < N; q++)
            for (int v = 0; v < C; v++) acc[q][v] = load(out + q * d + from + v * W);
        for (int64_t j = 0; j < count; j++) {
            vec x[C];
            for (int v = 0; v < C; v++) x[v] = load(value + at[j] + from + v * W);
            for (int q = 0; q < N; q++) {
                float own = chances[q * width + j];
                if constexpr (std::is_same_v<E, int8_t>) own *= scale[j];
                const vec chance = splat(own);
                for (int v = 0; v < C; v++) acc[q][v] = fused(chance, x[v], acc[q][v]);
            }
        }
        for (int q = 0; q < N; q++)
            for (int v = 0; v < C; v++) store(out + q * d + from + v * W, acc[q][v]);
    }
}

template <class E, int ND>
static void mix_rows(const Pages& pages, const Item& item, const int64_t* entries,
                     const float* chances, int64_t per_head, int64_t reach, int64_t width,
                     float* out) {
    constexpr int64_t d = ND * W;
    const E* values = (const E*)pages.values;
    runs(pages, values, item, entries, reach, [&](int64_t begin, int64_t count, const int64_t* at) {
        for (int64_t head = item.head; head < item.last; head++) {
            const E* value = values + head * d;
            vec scale = {};
            if constexpr (std::is_same_v<E, int8_t>)
                scale = scales_of<d>(pages.value_scales + head, at, count);
            for (int64_t i = 0; i < per_head;) {
                const int64_t q = (head - item.head) * per_head + i, left = per_head - i;
                const float* own = chances + q * width + begin;
                float* to = out + q * d;
                const auto run = [&](auto n) {
                    mix_run<E, ND, n()>(value, at, count, own, width, to, scale);
                    i += n();
                };
                if (left >= 4) {
                    run(std::integral_constant<int, 4>());
                } else if constexpr (std::is_same_v<E, float>) {
                    if (left == 3) run(std::integral_constant<int, 3>());
                    else if (left == 2) run(std::integral_constant<int, 2>());
                    else run(std::integral_constant<int, 1>());
                } else {  // fewer forms to compile
                    run(std::integral_constant<int, 1>());
                }
            }
        }
    });
}

// Scores of one query become chances; places behind `seen` get none.
static void soften(float* scores, int64_t seen, int64_t width, float scale) {
    for (int64_t j = seen; j < width; j++) scores[j] = -INFINITY;
    vec most = splat(-INFINITY);
    for (int64_t j = 0; j < width; j += W) {
        const vec s = load(scores + j);
        most = s > most ? s : most;
    }
    float top = -INFINITY;
    for (int64_t i = 0; i < W; i++) top = std::max(top, most[i]);
    vec weight = {};
    for (int64_t j = 0; j < width; j += W) {
        const vec chance = vexp((load(scores + j) - top) * scale);
        store(scores + j, chance);
        weight += chance;
    }
    const float share = 1.0f / sum(weight);
    for (int64_t j = 0; j < width; j += W) store(scores + j, load(scores + j) * share);
}

struct Scratch {
    std::vector<float> floats;
    std::vector<int64_t> entries;
};

template <class E, int ND>
static void attend_item(const Ragged& batch, const Item& item, int64_t layer, const float* query,
                        int64_t heads, float* out, Scratch& kept) {
    const Pages& pages = batch.pages;
    const int64_t *slots = batch.slots, d = ND * W, group = heads / pages.kv_heads;
    const int64_t per_head = item.count * group, count = per_head * (item.last - item.head);
    const int64_t reach = slots[item.first + item.count - 1] + 1;
    const int64_t width = (reach + W - 1) / W * W;
    std::vector<float>& room = kept.floats;
    if ((int64_t)room.size() < count * (width + 2 * d)) room.resize(count * (width + 2 * d));
    find_entries(batch, item, layer, reach, kept.entries);
    const int64_t* entries = kept.entries.data();
    float *scores = room.data(), *own = scores + count * width, *found = own + count * d;
    const auto place = [&](int64_t t, int64_t head) {
        return ((item.first + t) * heads + (item.head + head) * group) * d;
    };
    for (int64_t head = 0; head < item.last - item.head; head++)
        for (int64_t t = 0; t < item.count; t++)
            std::memcpy(own + (head * per_head + t * group) * d, query + place(t, head),
                        group * d * sizeof(float));
    score_rows<E, ND>(pages, item, entries, own, per_head, reach, width, scores);
    const float scale = 1.0f / std::sqrt((float)d);
    for (int64_t q = 0; q < count; q++)
        soften(scores + q * width, slots[item.first + q % per_head / group] + 1, width, scale);
    std::memset(found, 0, count * d * sizeof(float));
    mix_rows<E, ND>(pages, item, entries, scores, per_head, reach, width, found);
    for (int64_t head = 0; head < item.last - item.head; head++)
        for (int64_t t = 0; t < item.count; t++)
            std::memcpy(out + place(t, head), found + (head * per_head + t * group) * d,
                        group * d * sizeof(float));
}

template <class E>
static void attend_wide(const Ragged& batch, const Item& item, int64_t layer, const float* query,
                        int64_t heads, float* out, Scratch& room) {
    const auto as = [&](auto d) { attend_item<E, d() / W>(batch, item, layer, query, heads, out, room); };
    switch (batch.pages.head_dim) {
        case 16: return as(std::integral_constant<int, 16>());
        case 32: return as(std::integral_constant<int, 32>());
        case 64: return as(std::integral_constant<int, 64>());
        case 80: return as(std::integral_constant<int, 80>());
        case 96: return as(std::integral_constant<int, 96>());
        default: return as(std::integral_constant<int, 128>());
    }
}

static void attend_any(const Ragged& batch, const Item& item, int64_t layer, const float* query,
                       int64_t heads, float* out, Scratch& room) {
    switch (batch.pages.kind) {
        case 1: return attend_wide<bf16>(batch, item, layer, query, heads, out, room);
        case 2: return attend_wide<int8_t>(batch, item, layer, query, heads, out, room);
        default: return attend_wide<float>(batch, item, layer, query, heads, out, room);
    }
}

// Keys and values of the first `writes` tokens, `stride` floats apart, into their places.
template <class E>
static void write_as(const Pages& pages, int64_t layer, const float* key, const float* value,
                     int64_t stride, const int64_t* rows, const int64_t* places, int64_t begin,
                     int64_t end) {
    const int64_t d = pages.head_dim;
    for (int64_t t = begin; t < end; t++)
        for (int64_t head = 0; head < pages.kv_heads; head++) {
            const int64_t at = pages.slot(rows[t], layer, places[t]) * pages.kv_heads + head;
            const int64_t from = t * stride + head * d;
            put_entry(key + from, d, (E*)pages.keys + at * d, pages.key_scales + at);
            put_entry(value + from, d, (E*)pages.values + at * d, pages.value_scales + at);
        }
}

static void write_entries(const Pages& pages, int64_t layer, const float* key, const float* value,
                          int64_t stride, const int64_t* rows, const int64_t* places,
                          int64_t writes, int64_t me, int64_t all) {
    const Share share(writes, me, all);
    const auto write = pages.kind == 1   ? write_as<bf16>
                       : pages.kind == 2 ? write_as<int8_t>
                                         : write_as<float>;
    write(pages, layer, key, value, stride, rows, places, share.begin, share.end);
}

// What is to be done for a batch, for all layers alike.
static std::vector<Item> items_of(const Ragged& batch, int64_t threads) {
    std::vector<Item> items;
    // All heads of a row at once read its pages in order; where rows are few, heads are shared out.
    const int64_t heads = batch.pages.kv_heads, together = batch.pieces >= 2 * threads ? heads : 1;
    int64_t token = 0;
    for (int64_t s = 0; s < batch.pieces; s++)
        for (int64_t end = token + batch.counts[s]; token < end;) {
            const int64_t count = std::min(QUERIES, end - token);
            for (int64_t head = 0; head < heads; head += together)
                items.push_back({s, token, count, head, head + together});
            token += count;
        }
    return items;
}

// Write the entries of the first `writes` tokens, then attend: query [N, heads, d] -> out.
static void attend(const Ragged& batch, const std::vector<Item>& items, int64_t layer,
                   int64_t heads, const float* query, const float* key, const float* value,
                   int64_t stride, int64_t writes, float* out, int64_t me, int64_t all) {
    static thread_local Scratch room;
    if (writes) {
        write_entries(batch.pages, layer, key, value, stride, batch.own_rows, batch.written, writes,
                      me, all);
#pragma omp barrier
    }
    const int64_t many = (int64_t)items.size();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < many; i++)
        attend_any(batch, items[i], layer, query, heads, out, room);
}

}  // namespace mor
