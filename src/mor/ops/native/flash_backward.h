// The gradients of attention in training: see flash.h.
#pragma once
#include "flash.h"

namespace mor {

struct FlashGradients {
    const float* direction;  // of out
    float *query, *key, *value;
};

static void flash_backward(const Flash& how, const FlashGradients& to, const Job& job, Room& room) {
    const Rows rows(how, job, room);
    const int64_t dp = rows.dp, tiles = rows.high / TILE;
    room.begin(rows.high * (3 * dp + 2) + 2 * W + KEY_BLOCK * (6 * dp + 2 * QUERY_BLOCK) + tiles + 2 * W);
    float *query = room.take(rows.high * dp), *direction = room.take(rows.high * dp);
    float *to_query = room.take(rows.high * dp), *sums = room.take(rows.high), *own = room.take(rows.high);
    float *key = room.take(KEY_BLOCK * dp), *value = room.take(KEY_BLOCK * dp);
    float *keys = room.take(KEY_BLOCK * dp), *values = room.take(KEY_BLOCK * dp);
    float *to_key = room.take(KEY_BLOCK * dp), *to_value = room.take(KEY_BLOCK * dp);
    float *chances = room.take(KEY_BLOCK * QUERY_BLOCK), *pulls = room.take(KEY_BLOCK * QUERY_BLOCK);
    const float scale = 1.0f / std::sqrt((float)how.d);
    std::memset(query, 0, 3 * rows.high * dp * sizeof(float));
    std::memset(sums, 0, rows.high * sizeof(float));
    std::memset(own, 0, rows.high * sizeof(float));
    for (int64_t row = 0; row < rows.real; row++) {
        const int64_t place = rows.places[row];
        const float *mixed = how.out + place * how.d, *down = to.direction + place * how.d;
        take(how.query + place * how.d, how.d, scale * LOG2E, query + row * dp);
        take(down, how.d, 1, direction + row * dp);
        sums[row] = how.sums[place];
        vec product = {};
        int64_t i = 0;
        for (; i + W <= how.d; i += W) product = fused(load(mixed + i), load(down + i), product);
        float rest = 0;
        for (; i < how.d; i++) rest = fused(mixed[i], down[i], rest);
        own[row] = sum(product) + rest;
    }
    for (int64_t base = 0; base < job.reach; base += KEY_BLOCK) {
        const int64_t many = std::min(KEY_BLOCK, job.reach - base);
        for (int64_t j = 0; j < many; j++) {
            take(rows.entry(how.key, base + j), how.d, 1, key + j * dp);
            take(rows.entry(how.value, base + j), how.d, 1, value + j * dp);
        }
        turn_block(key, many, dp, keys);
        turn_block(value, many, dp, values);
        std::memset(to_key, 0, KEY_BLOCK * dp * sizeof(float));
        std::memset(to_value, 0, KEY_BLOCK * dp * sizeof(float));
        for (int64_t first = 0; first < rows.high; first += QUERY_BLOCK) {
            const int64_t high = std::min(QUERY_BLOCK, rows.high - first);
            if (rows.reach(first, first + high) <= base) continue;
            int64_t begins[KEY_BLOCK / W];  // first row that sees each W keys, of whole tiles
            for (int64_t w = 0; w < KEY_BLOCK / W; w++) begins[w] = high;
            for (int64_t tile = high - TILE; tile >= 0; tile -= TILE) {
                int64_t slots[TILE], least = INT64_MAX, most = 0;
                for (int64_t r = 0; r < TILE; r++) {
                    slots[r] = rows.slots[first + tile + r] - base;
                    least = std::min(least, slots[r]), most = std::max(most, slots[r]);
                }
                const int64_t seen = most < 0 ? 0 : std::min(KEY_BLOCK, most / W * W + W);
                const auto both = [&](auto count, int64_t begin) {
                    constexpr int C = count();
                    alignas(64) vec acc[TILE][C];
                    float* at = chances + tile * KEY_BLOCK + begin;
                    meet<C>(query + (first + tile) * dp, dp, keys + begin, acc);
                    for (int r = 0; r < TILE; r++)
                        for (int c = 0; c < C; c++) {
                            vec score = acc[r][c];
                            if (least < begin + C * W) score = hide(score, slots[r], begin + c * W);
                            store(at + r * KEY_BLOCK + c * W, power(score - sums[first + tile + r]));
                        }
                    meet<C>(direction + (first + tile) * dp, dp, values + begin, acc);
                    for (int r = 0; r < TILE; r++)
                        for (int c = 0; c < C; c++)
                            store(pulls + (tile + r) * KEY_BLOCK + begin + c * W,
                                  load(at + r * KEY_BLOCK + c * W) *
                                      (acc[r][c] - own[first + tile + r]));
                };
                for (int64_t begin = 0; begin < seen;) {
                    const int64_t left = std::min((seen - begin) / W, NV);
                    with_count<NV>(left, [&](auto count) { both(count, begin); });
                    begin += left * W;
                }
                for (int64_t w = 0; w < seen / W; w++) begins[w] = tile;
                for (int64_t r = 0; r < TILE && seen < KEY_BLOCK; r++) {
                    const int64_t at = (tile + r) * KEY_BLOCK + seen;
                    std::memset(chances + at, 0, (KEY_BLOCK - seen) * sizeof(float));
                    std::memset(pulls + at, 0, (KEY_BLOCK - seen) * sizeof(float));
                }
            }
            for (int64_t j = 0; j < many; j += HIGH) {
                // Ascending slots or not: no row before the first that sees any of these keys counts.
                const int64_t begin = begins[j / W], at = begin * KEY_BLOCK + j;
                const int64_t from = (first + begin) * dp;
                mix<1, KEY_BLOCK>(chances + at, direction + from, high - begin, dp, to_value + j * dp);
                mix<1, KEY_BLOCK>(pulls + at, query + from, high - begin, dp, to_key + j * dp);
            }
            for (int64_t r = 0; r < std::min(high, rows.real - first); r += HIGH) {
                const int64_t reach = rows.reach(first + r, first + r + HIGH) - base;
                if (reach > 0)
                    mix<KEY_BLOCK, 1>(pulls + r * KEY_BLOCK, key, std::min(many, reach), dp,
                                      to_query + (first + r) * dp);
            }
        }
        for (int64_t j = 0; j < many; j++) {
            const int64_t place = ((rows.key + base + j) * how.kv_heads + job.head) * how.d;
            float *k = to.key + place, *v = to.value + place;
            if (job.partial) k = job.partial + (base + j) * how.d, v = k + job.reach * how.d;
            give(to_key + j * dp, how.d, LN2, k);
            give(to_value + j * dp, how.d, 1, v);
        }
    }
    for (int64_t row = 0; row < rows.real; row++)
        give(to_query + row * dp, how.d, scale, to.query + rows.places[row] * how.d);
}

// The sums of jobs that share keys, in the jobs' own order.
static void add_up(const Flash& how, const FlashGradients& to, const std::vector<Job>& jobs,
                   int64_t piece, int64_t head) {
    for (int64_t first = 0;;) {
        const auto job = std::find_if(jobs.begin(), jobs.end(), [&](const Job& one) {
            return one.piece == piece && one.head == head && one.first == first && one.partial;
        });
        if (job == jobs.end()) return;
        for (int64_t j = 0; j < job->reach; j++) {
            const int64_t place = ((how.pieces[piece * 4 + 2] + j) * how.kv_heads + head) * how.d;
            const float *key = job->partial + j * how.d, *value = key + job->reach * how.d;
            for (int64_t i = 0; i < how.d; i++) to.key[place + i] += key[i], to.value[place + i] += value[i];
        }
        first += job->count;
    }
}

}  // namespace mor
