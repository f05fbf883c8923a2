// Attention of ragged virtual sequences over the paged pool. The plain form is
// mor.engine.attend.padded_attention.
#pragma once
#include <algorithm>
#include <vector>

#include "gemm.h"

namespace mor {

// Pool [pages, page_size, kv_heads, head_dim] and one page table [rows, layers, columns].
struct Pages {
    float *keys, *values;
    const int64_t* table;
    int64_t page_size, kv_heads, head_dim, layers, columns;
    int64_t slot(int64_t row, int64_t layer, int64_t place) const {
        return table[(row * layers + layer) * columns + place / page_size] * page_size +
               place % page_size;
    }
};

// Up to QUERIES queries of one row that follow each other, for one head of keys.
constexpr int64_t QUERIES = 8;
struct Item {
    int64_t row, first, count, head;
};

// scores[q][j] = query q . key j for `count` queries of ND vectors each.
template <int ND>
static void score_rows(const Pages& pages, const Item& item, int64_t layer, const float* query,
                       int64_t count, int64_t reach, int64_t width, float* scores) {
    const int64_t d = ND * W, stride = pages.kv_heads * d;
    for (int64_t begin = 0; begin < reach; begin += pages.page_size) {
        const int64_t end = std::min(reach, begin + pages.page_size);
        const float* key = pages.keys + pages.slot(item.row, layer, begin) * stride + item.head * d;
        for (int64_t j = begin; j < end; j++, key += stride) {
            vec k[ND];
            for (int v = 0; v < ND; v++) k[v] = load(key + v * W);
            for (int64_t q = 0; q < count; q++) {
                vec found = load(query + q * d) * k[0];
                for (int v = 1; v < ND; v++) found += load(query + q * d + v * W) * k[v];
                scores[q * width + j] = sum(found);
            }
        }
    }
}

// out[q] = sum over j of chances[q][j] value j, for N queries.
template <int ND, int N>
static void mix_rows(const Pages& pages, const Item& item, int64_t layer, const float* chances,
                     int64_t width, int64_t reach, float* out) {
    const int64_t d = ND * W, stride = pages.kv_heads * d;
    vec acc[N][ND] = {};
    for (int64_t begin = 0; begin < reach; begin += pages.page_size) {
        const int64_t end = std::min(reach, begin + pages.page_size);
        const float* value =
            pages.values + pages.slot(item.row, layer, begin) * stride + item.head * d;
        for (int64_t j = begin; j < end; j++, value += stride) {
            vec x[ND];
            for (int v = 0; v < ND; v++) x[v] = load(value + v * W);
            for (int q = 0; q < N; q++)
                for (int v = 0; v < ND; v++) acc[q][v] += chances[q * width + j] * x[v];
        }
    }
    for (int q = 0; q < N; q++)
        for (int v = 0; v < ND; v++) store(out + q * d + v * W, acc[q][v]);
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

template <int ND>
static void attend_item(const Pages& pages, const Item& item, int64_t layer, const float* query,
                        const int64_t* slots, int64_t heads, float* out, std::vector<float>& room) {
    const int64_t d = ND * W, group = heads / pages.kv_heads, count = item.count * group;
    const int64_t reach = slots[item.first + item.count - 1] + 1;
    const int64_t width = (reach + W - 1) / W * W;
    room.resize(count * (width + 2 * d));
    float *scores = room.data(), *own = scores + count * width, *found = own + count * d;
    for (int64_t t = 0; t < item.count; t++)
        std::memcpy(own + t * group * d, query + ((item.first + t) * heads + item.head * group) * d,
                    group * d * sizeof(float));
    score_rows<ND>(pages, item, layer, own, count, reach, width, scores);
    const float scale = 1.0f / std::sqrt((float)d);
    for (int64_t q = 0; q < count; q++)
        soften(scores + q * width, slots[item.first + q / group] + 1, width, scale);
    for (int64_t q = 0; q < count;) {
        const float* chances = scores + q * width;
        float* to = found + q * d;
        if (count - q >= 4) mix_rows<ND, 4>(pages, item, layer, chances, width, reach, to), q += 4;
        else if (count - q == 3) mix_rows<ND, 3>(pages, item, layer, chances, width, reach, to), q += 3;
        else if (count - q == 2) mix_rows<ND, 2>(pages, item, layer, chances, width, reach, to), q += 2;
        else mix_rows<ND, 1>(pages, item, layer, chances, width, reach, to), q += 1;
    }
    for (int64_t t = 0; t < item.count; t++)
        std::memcpy(out + ((item.first + t) * heads + item.head * group) * d, found + t * group * d,
                    group * d * sizeof(float));
}

static void attend_any(const Pages& pages, const Item& item, int64_t layer, const float* query,
                       const int64_t* slots, int64_t heads, float* out, std::vector<float>& room) {
    switch (pages.head_dim / W) {
        case 1: return attend_item<1>(pages, item, layer, query, slots, heads, out, room);
        case 2: return attend_item<2>(pages, item, layer, query, slots, heads, out, room);
        case 4: return attend_item<4>(pages, item, layer, query, slots, heads, out, room);
        case 5: return attend_item<5>(pages, item, layer, query, slots, heads, out, room);
        case 6: return attend_item<6>(pages, item, layer, query, slots, heads, out, room);
        default: return attend_item<8>(pages, item, layer, query, slots, heads, out, room);
    }
}

// Keys and values of the first `writes` tokens, `stride` floats apart, into their places.
static void write_entries(const Pages& pages, int64_t layer, const float* key, const float* value,
                          int64_t stride, const int64_t* rows, const int64_t* places,
                          int64_t writes, int64_t me, int64_t all) {
    const int64_t width = pages.kv_heads * pages.head_dim, bytes = width * sizeof(float);
    Share share(writes, me, all);
    for (int64_t t = share.begin; t < share.end; t++) {
        const int64_t slot = pages.slot(rows[t], layer, places[t]);
        std::memcpy(pages.keys + slot * width, key + t * stride, bytes);
        std::memcpy(pages.values + slot * width, value + t * stride, bytes);
    }
}

}  // namespace mor
