// A block of entries, laid out for products, and what rows make of it. `paged_attention.cpp` says what for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int KEYS = 64;  // entries of a block
constexpr int VECTORS = KEYS / LANES;
#ifdef __AVX512F__
constexpr int STRIP = 6, ACROSS = 4;  // sums that stay in registers: rows, and vectors of entries or dimensions
#else
constexpr int STRIP = 4, ACROSS = 2;
#endif
constexpr int SPAN = ACROSS * LANES;
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

// Entries of one block, in words: keys as [heads][size / PAIR][KEYS], a word several dimensions of an entry; values as
// [heads][KEYS / PAIR][v_size], a word several entries' dimension. Those before the first and behind the last entry are
// zero: what nobody sees may be no number, and weighs nothing. All heads of an entry are read at once, since they lie
// together.
struct Block {
    std::vector<uint32_t> keys, values;

    void make_room(const Layout& at, int heads) {
        keys.resize(int64_t(heads) * (at.size / PAIR) * KEYS);
        values.resize(int64_t(heads) * (KEYS / PAIR) * at.v_size);
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
                    uint32_t* to = &keys[(int64_t(h) * pairs + p) * (2 / PAIR) * KEYS + first];
                    for (int i = 0; i < width; ++i, to += 2 / PAIR * KEYS) {
                        store(to, PAIR == 2 ? tile[i] : tile[i] << 16);
                        if (PAIR == 1) store(to + KEYS, tile[i] & 0xffff0000u);
                    }
                }
        for (int i = 0; i < KEYS; i += PAIR)
            for (int h = 0; h < heads; ++h) {
                uint32_t* to = &values[(int64_t(h) * KEYS + i) / PAIR * at.v_size];
                const uint16_t* at_head = x.v + (head + h) * at.v_head;
                const uint16_t* entry[PAIR] = {};
                for (int n = 0; n < PAIR; ++n) {
                    if (i + n >= begin && i + n < count) entry[n] = at_head + slots[i + n] * at.v_slot;
                    for (int d = 0; d < at.v_size && i + n + KEYS < count; d += 32)
                        __builtin_prefetch(at_head + slots[i + n + KEYS] * at.v_slot + d);
                }
                for (int d = 0; d < at.v_size; d += LANES) {
                    words word{};
                    for (int n = 0; n < PAIR; ++n)
                        if (entry[n])
                            word |= __builtin_convertvector(load<halves>(entry[n] + d), words) << 16 * (n + 2 - PAIR);
                    store(to + d, word);
                }
            }
    }
};

// What a row has summed up so far: scores relative to `top` (base 2), weights' `total`, `mixed` [v_size] values.
struct Sums {
    float *top, *total, *mixed;
};

struct Row {
    const uint32_t* q;  // its query, in words
    int first, end;  // entries that it sees
};

// scores[r][j] = scale * q[r] . keys[j], in units of log 2; minus infinity where row r does not see entry j.
template <int R>
inline void score(float (&scores)[R][KEYS], const Layout& at, const uint32_t* keys, const Row* rows, int at_entry) {
    const uint32_t* q[R];
    for (int r = 0; r < R; ++r) q[r] = rows[r].q;
    for (int from = 0; from < KEYS; from += SPAN) {
        floats found[R][ACROSS] = {};
        for (int p = 0; p < at.size / PAIR; ++p) {
            words key[ACROSS];
            for (int c = 0; c < ACROSS; ++c) key[c] = load<words>(keys + int64_t(p) * KEYS + from + c * LANES);
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < ACROSS; ++c) found[r][c] = multiplied(found[r][c], q[r][p], key[c]);
        }
        for (int r = 0; r < R; ++r) {
            const bool sees_all = rows[r].first <= at_entry + from && rows[r].end >= at_entry + from + SPAN;
            for (int c = 0; c < ACROSS; ++c) {
                floats x = found[r][c] * (at.scale * LOG2E);
                const ints entry = ascending() + (at_entry + from + c * LANES);
                if (!sees_all) x = (entry < rows[r].end) & (entry >= rows[r].first) ? x : all(NONE);
                store(&scores[r][from + c * LANES], x);
            }
        }
    }
}

// Scores become weights relative to the largest one so far, in words; earlier sums count keep[r] of what they did.
template <int R>
inline void weigh(uint32_t (&weights)[R][KEYS / PAIR], float (&keep)[R], const float (&scores)[R][KEYS], Sums sums) {
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
            if constexpr (PAIR == 2) store(&weights[r][c * LANES / 2], narrow(weight));
            else store(&weights[r][c * LANES], weight);
        }
        keep[r] = power_of_two(before - base);
        sums.top[r] = now;
        sums.total[r] = sums.total[r] * keep[r] + sum(total);
    }
}

// mixed[r] = keep[r] * mixed[r] + sum_j weights[r][j] * values[j], of N vectors' dimensions.
template <int R, int N>
inline void mix(float* mixed, const float (&keep)[R], const uint32_t (&weights)[R][KEYS / PAIR], const uint32_t* values,
                int size) {
    floats sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < N; ++c) sums[r][c] = load<floats>(mixed + int64_t(r) * size + c * LANES) * keep[r];
    for (int i = 0; i < KEYS / PAIR; ++i) {
        words value[N];
        for (int c = 0; c < N; ++c) value[c] = load<words>(values + int64_t(i) * size + c * LANES);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < N; ++c) sums[r][c] = multiplied(sums[r][c], weights[r][i], value[c]);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < N; ++c) store(mixed + int64_t(r) * size + c * LANES, sums[r][c]);
}

template <int R>
void attend_strip(const Layout& at, const uint32_t* keys, const uint32_t* values, const Row* rows, Sums sums,
                  int at_entry) {
    alignas(64) float scores[R][KEYS];
    alignas(64) uint32_t weights[R][KEYS / PAIR];
    float keep[R];
    score<R>(scores, at, keys, rows, at_entry);
    weigh<R>(weights, keep, scores, sums);
    int d = 0;
    for (; d + SPAN <= at.v_size; d += SPAN) mix<R, ACROSS>(sums.mixed + d, keep, weights, values + d, at.v_size);
    for (; d < at.v_size; d += LANES) mix<R, 1>(sums.mixed + d, keep, weights, values + d, at.v_size);
}

// The rows of one KV head over the block that begins with entry `at_entry`.
inline void attend_rows(const Layout& at, const Block& block, int head, const Row* rows, int count, Sums sums,
                        int at_entry) {
    using Attend = void (*)(const Layout&, const uint32_t*, const uint32_t*, const Row*, Sums, int);
    constexpr Attend of_rows[] = {attend_strip<1>, attend_strip<2>, attend_strip<3>,
                                  attend_strip<4>, attend_strip<5>, attend_strip<6>};
    const uint32_t* keys = &block.keys[int64_t(head) * (at.size / PAIR) * KEYS];
    const uint32_t* values = &block.values[int64_t(head) * (KEYS / PAIR) * at.v_size];
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
