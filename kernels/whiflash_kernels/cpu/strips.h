// A block of entries, laid out for products, and what rows make of it. `paged_attention.cpp` says what for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int KEYS = 64;  // entries of a block: four vectors of scores
constexpr int VECTORS = KEYS / LANES;
constexpr int STRIP = 6;  // rows whose sums stay in registers: 6 x 4 vectors
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896341f;

struct Layout {
    const int32_t *table, *starts, *lengths;
    const int64_t* rows;
    int64_t table_row, q_row, k_slot, k_head, v_slot, v_head;
    int32_t requests, heads, kv_heads, size, v_size, causal, window;
    float scale;
};

struct Tensors {
    uint16_t* out;
    const uint16_t *q, *k, *v;
    const float* sinks;
};

// Entries of one block, laid out for `dot_pairs`: keys as [heads][size / 2][KEYS] pairs of dimensions, values as
// [heads][KEYS / 2][v_size] pairs of entries. Those before the first and behind the last entry are zero: what nobody
// sees may be no number, and weighs nothing. All heads of an entry are read at once, since they lie together.
struct Block {
    std::vector<uint32_t> keys, values;

    void make_room(const Layout& at, int heads) {
        keys.resize(int64_t(heads) * (at.size / 2) * KEYS);
        values.resize(int64_t(heads) * (KEYS / 2) * at.v_size);
    }

    // `slots` of entries [begin, count), of which those up to KEYS belong to this block; the ones behind are asked for.
    void gather(const Layout& at, const Tensors& x, const int32_t* slots, int begin, int count, int head, int heads) {
        const int pairs = at.size / 2;
        for (int first = 0; first < KEYS; first += LANES)
            for (int h = 0; h < heads; ++h)
                for (int p = 0; p < pairs; p += LANES) {
                    const uint16_t* at_head = x.k + (head + h) * at.k_head + 2 * p;
                    const int width = std::min(LANES, pairs - p), filled = std::min(LANES, count - first);
                    words tile[LANES] = {};
                    for (int i = std::max(0, begin - first); i < filled; ++i) {
                        const uint16_t* row = at_head + slots[first + i] * at.k_slot;
                        if (width == LANES) tile[i] = load<words>(row);
                        else std::memcpy(&tile[i], row, 4 * width);
                        if (first + i + KEYS < count)
                            __builtin_prefetch(at_head + slots[first + i + KEYS] * at.k_slot);
                    }
                    transpose(tile);
                    uint32_t* to = &keys[(int64_t(h) * pairs + p) * KEYS + first];
                    for (int i = 0; i < width; ++i) store(to + i * KEYS, tile[i]);
                }
        for (int i = 0; i < KEYS; i += 2)
            for (int h = 0; h < heads; ++h) {
                uint32_t* to = &values[(int64_t(h) * (KEYS / 2) + i / 2) * at.v_size];
                const uint16_t* at_head = x.v + (head + h) * at.v_head;
                const uint16_t* even = i >= begin && i < count ? at_head + slots[i] * at.v_slot : nullptr;
                const uint16_t* odd = i + 1 >= begin && i + 1 < count ? at_head + slots[i + 1] * at.v_slot : nullptr;
                for (int d = 0; d < at.v_size; d += LANES) {
                    words pair{};
                    if (even) pair = __builtin_convertvector(load<halves>(even + d), words);
                    if (odd) pair |= __builtin_convertvector(load<halves>(odd + d), words) << 16;
                    store(to + d, pair);
                    if (d % (2 * LANES) == 0) {
                        if (i + KEYS < count) __builtin_prefetch(at_head + slots[i + KEYS] * at.v_slot + d);
                        if (i + 1 + KEYS < count) __builtin_prefetch(at_head + slots[i + 1 + KEYS] * at.v_slot + d);
                    }
                }
            }
    }
};

// What a row has summed up so far: scores relative to `top` (base 2), weights' `total`, `mixed` [v_size] values.
struct Sums {
    float *top, *total, *mixed;
};

struct Row {
    const uint16_t* q;
    int first, end;  // entries that it sees
};

// scores[r][j] = scale * q[r] . keys[j], in units of log 2; minus infinity where row r does not see entry j.
template <int R>
inline void score(float (&scores)[R][KEYS], const Layout& at, const uint32_t* keys, const Row* rows, int at_entry) {
    floats found[R][VECTORS] = {};
    for (int p = 0; p < at.size / 2; ++p) {
        words key[VECTORS];
        for (int c = 0; c < VECTORS; ++c) key[c] = load<words>(keys + int64_t(p) * KEYS + c * LANES);
        for (int r = 0; r < R; ++r) {
            const uint32_t pair = load<uint32_t>(rows[r].q + 2 * p);
            for (int c = 0; c < VECTORS; ++c) found[r][c] = dot_pairs(found[r][c], pair, key[c]);
        }
    }
    for (int r = 0; r < R; ++r) {
        const bool sees_all = rows[r].first <= at_entry && rows[r].end >= at_entry + KEYS;
        for (int c = 0; c < VECTORS; ++c) {
            floats x = found[r][c] * (at.scale * LOG2E);
            const ints entry = ascending() + (at_entry + c * LANES);
            if (!sees_all) x = (entry < rows[r].end) & (entry >= rows[r].first) ? x : all(NONE);
            store(&scores[r][c * LANES], x);
        }
    }
}

// Scores become weights relative to the largest one so far, in pairs of bfloat16; earlier sums count keep[r] of what
// they did.
template <int R>
inline void weigh(uint32_t (&weights)[R][KEYS / 2], float (&keep)[R], const float (&scores)[R][KEYS], Sums sums) {
    for (int r = 0; r < R; ++r) {
        floats x[VECTORS], top = all(NONE), total{};
        for (int c = 0; c < VECTORS; ++c) {
            x[c] = load<floats>(&scores[r][c * LANES]);
            top = larger(top, x[c]);
        }
        const float before = sums.top[r], now = std::max(before, largest(top));
        const float base = now == NONE ? 0.0f : now;  // A row that has seen nothing yet weighs nothing.
        for (int c = 0; c < VECTORS; ++c) {
            const floats weight = power_of_two(x[c] - base);
            total += weight;
            store(&weights[r][c * LANES / 2], narrow(weight));
        }
        keep[r] = power_of_two(before - base);
        sums.top[r] = now;
        sums.total[r] = sums.total[r] * keep[r] + sum(total);
    }
}

// mixed[r] = keep[r] * mixed[r] + sum_j weights[r][j] * values[j], of N vectors' dimensions.
template <int R, int N>
inline void mix(float* mixed, const float (&keep)[R], const uint32_t (&weights)[R][KEYS / 2], const uint32_t* values,
                int size) {
    floats sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < N; ++c) sums[r][c] = load<floats>(mixed + int64_t(r) * size + c * LANES) * keep[r];
    for (int i = 0; i < KEYS / 2; ++i) {
        words value[N];
        for (int c = 0; c < N; ++c) value[c] = load<words>(values + int64_t(i) * size + c * LANES);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < N; ++c) sums[r][c] = dot_pairs(sums[r][c], weights[r][i], value[c]);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < N; ++c) store(mixed + int64_t(r) * size + c * LANES, sums[r][c]);
}

template <int R>
void attend_strip(const Layout& at, const uint32_t* keys, const uint32_t* values, const Row* rows, Sums sums,
                  int at_entry) {
    alignas(64) float scores[R][KEYS];
    alignas(64) uint32_t weights[R][KEYS / 2];
    float keep[R];
    score<R>(scores, at, keys, rows, at_entry);
    weigh<R>(weights, keep, scores, sums);
    int d = 0;
    for (; d + KEYS <= at.v_size; d += KEYS) mix<R, VECTORS>(sums.mixed + d, keep, weights, values + d, at.v_size);
    for (; d < at.v_size; d += LANES) mix<R, 1>(sums.mixed + d, keep, weights, values + d, at.v_size);
}

// The rows of one KV head over the block that begins with entry `at_entry`.
inline void attend_rows(const Layout& at, const Block& block, int head, const Row* rows, int count, Sums sums,
                        int at_entry) {
    using Attend = void (*)(const Layout&, const uint32_t*, const uint32_t*, const Row*, Sums, int);
    constexpr Attend of_rows[STRIP] = {attend_strip<1>, attend_strip<2>, attend_strip<3>,
                                       attend_strip<4>, attend_strip<5>, attend_strip<6>};
    const uint32_t* keys = &block.keys[int64_t(head) * (at.size / 2) * KEYS];
    const uint32_t* values = &block.values[int64_t(head) * (KEYS / 2) * at.v_size];
    for (int r = 0; r < count; r += STRIP) {
        const int strip = std::min(STRIP, count - r);
        int first = rows[r].first, end = rows[r].end;
        for (int i = r; i < r + strip; ++i) first = std::min(first, rows[i].first), end = std::max(end, rows[i].end);
        if (first >= at_entry + KEYS || end <= at_entry) continue;  // Nothing here that they see.
        const Sums of_strip{sums.top + r, sums.total + r, sums.mixed + int64_t(r) * at.v_size};
        of_rows[strip - 1](at, keys, values, rows + r, of_strip, at_entry);
    }
}

}  // namespace
