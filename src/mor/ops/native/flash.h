// Attention in training, forward and backward, over pieces that lie end to end: sequences, documents,
// or the tokens that a router chose. The plain forms are padded_segment_attention and slot_attention
// of mor.ops.attention.
//
// A block of queries meets a block of keys at a time. Forward keeps the scores of a block of queries
// over all their keys, which fit the second-level cache, and remembers of each query the logarithm
// of its sum; backward (flash_backward.h) makes the chances of two blocks again. Every result is one chain of sums in
// an order that hangs on the shapes of its own piece alone: not on the number of threads, nor on
// the pieces beside it.
#pragma once
#include <algorithm>
#include <vector>

#include "blocks.h"

namespace mor {

// query, out [N, heads, d], key, value [S, kv_heads, d], sums [N, heads] (to base 2).
struct Flash {
    const float *query, *key, *value;
    float *out, *sums;
    const int64_t* pieces;  // [count][4]: first query, queries, first key, keys
    const int64_t* slots;   // [N] last key of the piece that each sees; null: the one of its place
    int64_t count, heads, kv_heads, d;
};

// Rows of queries (tokens x heads of a group) that one job takes. Sums over the queries of a longer
// piece are made job by job, then added up.
constexpr int64_t JOB_ROWS = 1024;

// Some queries of a piece, for one head of keys.
struct Job {
    int64_t piece, head, first, count, reach;
    float* partial;  // where the sums of its keys go, [2][reach][d]; null: to the gradients
};

// Room on cache lines; grows.
class Room {
    std::vector<float> held;
    int64_t used = 0;

  public:
    std::vector<int64_t> slots, places;  // of the rows of a job
    void begin(int64_t size) {
        used = 0;
        if ((int64_t)held.size() < size + LINE / 4) held.resize(size + LINE / 4);
    }
    float* take(int64_t size) {
        const int64_t skip = (LINE - (int64_t)((uintptr_t)held.data() % LINE)) % LINE / 4;
        float* found = held.data() + skip + used;
        used += round_up(size, W);
        return found;
    }
};

// The rows of a job: query token by query token, a token's heads side by side, filled up with rows
// that see the first key and count for nothing.
struct Rows {
    const Flash& how;
    int64_t head, dp, real, high, key;
    int64_t *slots, *places;  // last key that each sees; where it stands among [N, heads]
    Rows(const Flash& how, const Job& job, Room& room) : how(how), head(job.head) {
        const int64_t group = how.heads / how.kv_heads;
        const int64_t query = how.pieces[job.piece * 4] + job.first;
        dp = round_up(how.d, W), real = job.count * group, key = how.pieces[job.piece * 4 + 2];
        high = round_up(round_up(real, HIGH), TILE);
        room.slots.assign(high, 0), room.places.resize(high);
        slots = room.slots.data(), places = room.places.data();
        for (int64_t t = 0, row = 0; t < job.count; t++)
            for (int64_t g = 0; g < group; g++, row++) {
                slots[row] = how.slots ? how.slots[query + t] : job.first + t;
                places[row] = (query + t) * how.heads + job.head * group + g;
            }
    }
    const float* entry(const float* entries, int64_t j) const {
        return entries + ((key + j) * how.kv_heads + head) * how.d;
    }
    // Keys that rows [first, last) see, at most.
    int64_t reach(int64_t first, int64_t last) const {
        return *std::max_element(slots + first, slots + last) + 1;
    }
};

static const float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

static void flash_forward(const Flash& how, const Job& job, Room& room) {
    const Rows rows(how, job, room);
    const int64_t dp = rows.dp, blocks = (job.reach + KEY_BLOCK - 1) / KEY_BLOCK;
    room.begin(blocks * KEY_BLOCK * (2 * dp + QUERY_BLOCK) + QUERY_BLOCK * (2 * dp + W + 2));
    float *columns = room.take(blocks * KEY_BLOCK * dp), *values = room.take(blocks * KEY_BLOCK * dp);
    float *chances = room.take(blocks * KEY_BLOCK * QUERY_BLOCK), *query = room.take(QUERY_BLOCK * dp);
    float *out = room.take(QUERY_BLOCK * dp), *tops = room.take(QUERY_BLOCK * W);
    for (int64_t j = 0; j < job.reach; j++) take(rows.entry(how.key, j), how.d, 1, values + j * dp);
    for (int64_t b = 0; b < blocks; b++)
        turn_block(values + b * KEY_BLOCK * dp, std::min(KEY_BLOCK, job.reach - b * KEY_BLOCK), dp,
                   columns + b * KEY_BLOCK * dp);
    for (int64_t j = 0; j < job.reach; j++) take(rows.entry(how.value, j), how.d, 1, values + j * dp);
    const float scale = LOG2E / std::sqrt((float)how.d);
    for (int64_t first = 0; first < rows.high; first += QUERY_BLOCK) {
        const int64_t high = std::min(QUERY_BLOCK, rows.high - first);
        const int64_t reach = rows.reach(first, first + high);
        std::memset(query, 0, high * dp * sizeof(float));
        std::memset(out, 0, high * dp * sizeof(float));
        for (int64_t r = 0; r < high && first + r < rows.real; r++)
            take(how.query + rows.places[first + r] * how.d, how.d, scale, query + r * dp);
        for (int64_t tile = 0; tile < high; tile += TILE) {
            int64_t slots[TILE], least = INT64_MAX, most = 0;
            vec top[TILE];
            for (int64_t r = 0; r < TILE; r++) {
                slots[r] = rows.slots[first + tile + r];
                least = std::min(least, slots[r]), most = std::max(most, slots[r]);
                top[r] = splat(-INFINITY);
            }
            const auto score = [&](auto count, int64_t begin) {
                constexpr int C = count();
                alignas(64) vec acc[TILE][C];
                const int64_t block = begin / KEY_BLOCK, within = begin % KEY_BLOCK;
                meet<C>(query + tile * dp, dp, columns + block * KEY_BLOCK * dp + within, acc);
                float* to = chances + (block * QUERY_BLOCK + tile) * KEY_BLOCK + within;
                for (int r = 0; r < TILE; r++)
                    for (int c = 0; c < C; c++) {
                        vec own = acc[r][c];
                        if (least < begin + C * W) own = hide(own, slots[r], begin + c * W);
                        top[r] = own > top[r] ? own : top[r];
                        store(to + r * KEY_BLOCK + c * W, own);
                    }
            };
            for (int64_t begin = 0; begin <= most;) {
                const int64_t left = std::min((most - begin) / W + 1, NV);
                with_count<NV>(left, [&](auto count) { score(count, begin); });
                begin += left * W;
            }
            for (int64_t r = 0; r < TILE; r++) store(tops + (tile + r) * W, top[r]);
            // Scores become chances; behind what the tile sees stand zeros.
            const int64_t seen = most / W * W + W;
            for (int64_t r = 0; r < TILE; r++) {
                float best = tops[(tile + r) * W];
                for (int64_t i = 1; i < W; i++) best = std::max(best, tops[(tile + r) * W + i]);
                vec weight = {};
                for (int64_t begin = 0; begin < reach; begin += W) {
                    float* at = chances + (begin / KEY_BLOCK * QUERY_BLOCK + tile + r) * KEY_BLOCK +
                                begin % KEY_BLOCK;
                    const vec chance = begin < seen ? power(load(at) - best) : (vec){};
                    weight += chance;
                    store(at, chance);
                }
                tops[(tile + r) * W] = best, tops[(tile + r) * W + 1] = sum(weight);
            }
        }
        for (int64_t r = 0; r < std::min(high, rows.real - first); r += HIGH) {
            const int64_t own = rows.reach(first + r, first + r + HIGH);
            for (int64_t b = 0; b * KEY_BLOCK < own; b++)
                mix<KEY_BLOCK, 1>(chances + (b * QUERY_BLOCK + r) * KEY_BLOCK,
                                  values + b * KEY_BLOCK * dp,
                                  std::min(KEY_BLOCK, own - b * KEY_BLOCK), dp, out + r * dp);
        }
        for (int64_t r = 0; r < high && first + r < rows.real; r++) {
            const int64_t place = rows.places[first + r];
            const float best = tops[r * W], weight = tops[r * W + 1], share = 1 / weight;
            how.sums[place] = best + std::log2(weight);
            give(out + r * dp, how.d, share, how.out + place * how.d);
        }
    }
}

// All jobs, the longest first. `partial` gets room for sums that several jobs make.
static std::vector<Job> jobs_of(const Flash& how, std::vector<float>* partial) {
    std::vector<Job> jobs;
    const int64_t group = how.heads / how.kv_heads, most = std::max<int64_t>(1, JOB_ROWS / group);
    int64_t size = 0;
    for (int64_t p = 0; p < how.count; p++)
        for (int64_t head = 0; head < how.kv_heads; head++) {
            const int64_t queries = how.pieces[p * 4 + 1];
            for (int64_t first = 0; first < queries; first += most) {
                Job job = {p, head, first, std::min(most, queries - first), 0, nullptr};
                const int64_t* slots = how.slots ? how.slots + how.pieces[p * 4] + first : nullptr;
                job.reach = 1 + (slots ? *std::max_element(slots, slots + job.count)
                                       : first + job.count - 1);
                if (queries > most) size += 2 * job.reach * how.d;
                jobs.push_back(job);
            }
        }
    if (partial) {
        partial->resize(size);
        float* at = partial->data();
        for (Job& job : jobs)
            if (how.pieces[job.piece * 4 + 1] > most) job.partial = at, at += 2 * job.reach * how.d;
    }
    std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) {
        return a.count * (2 * a.reach - a.count) > b.count * (2 * b.reach - b.count);
    });
    return jobs;
}

}  // namespace mor
