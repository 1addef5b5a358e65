// Attention of one new token in every row, over exactly the keys and values that the row has.
//
// out[r, h * share + j] = sum over i <= ends[r] of softmax_i(scale * q[r, h * share + j] . k[r, h, i]) * v[r, h, i]
//
// All bfloat16, contiguous: q, out [rows, heads * share, size]; keys [rows, heads, size, capacity]; values
// [rows, heads, capacity, size]; ends [rows] int64, the position of the newest token. Products, softmax and sums in
// float32. A key or value is read once for the `share` query heads that share it. size is a multiple of 4.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline uint16_t narrow(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int LINE = 32;   // bfloat16 in a cache line
constexpr int AHEAD = 8;  // rows of keys, or positions of values, that are asked for before they are read

// scores [share, capacity], q [share, size]. Rows of the next head follow those of this one, so asking ahead goes on there.
void scores_of(float* scores, const float* q, const uint16_t* keys, int share, int length, int capacity, int size) {
    for (int j = 0; j < share; ++j) std::fill(scores + j * capacity, scores + j * capacity + length, 0.0f);
    for (int d = 0; d < size; d += 4) {
        const uint16_t* k = keys + int64_t(d) * capacity;
        for (int row = AHEAD; row < AHEAD + 4; ++row)
            for (int i = 0; i < length; i += LINE) __builtin_prefetch(k + int64_t(row) * capacity + i);
        for (int j = 0; j < share; ++j) {
            float* s = scores + j * capacity;
            const float* x = q + j * size + d;
            const float a = x[0], b = x[1], c = x[2], e = x[3];
            for (int i = 0; i < length; ++i)
                s[i] += a * widen(k[i]) + b * widen(k[i + capacity]) + c * widen(k[i + 2 * capacity]) +
                        e * widen(k[i + 3 * capacity]);
        }
    }
}

void soften(float* scores, int length, float scale) {
    float top = scores[0], sum = 0;
    for (int i = 1; i < length; ++i) top = scores[i] > top ? scores[i] : top;
    for (int i = 0; i < length; ++i) scores[i] = std::exp(scale * (scores[i] - top));
    for (int i = 0; i < length; ++i) sum += scores[i];
    for (int i = 0; i < length; ++i) scores[i] *= 1 / sum;
}

void add_values(float* mixed, const float* weights, const uint16_t* values, int count, int size) {
    for (int i = 0; i < count; ++i)
        for (int d = 0; d < size; ++d) mixed[d] += weights[i] * widen(values[i * size + d]);
}

void add_four_values(float* mixed, const float* weights, const uint16_t* v, int size) {
    const float a = weights[0], b = weights[1], c = weights[2], e = weights[3];
    for (int d = 0; d < size; ++d)
        mixed[d] += a * widen(v[d]) + b * widen(v[d + size]) + c * widen(v[d + 2 * size]) + e * widen(v[d + 3 * size]);
}

}  // namespace

extern "C" void decode_attention(uint16_t* out, const uint16_t* q, const uint16_t* keys, const uint16_t* values,
                                 const int64_t* ends, int rows, int heads, int share, int size, int capacity,
                                 float scale) {
    std::vector<float> scores(int64_t(share) * capacity), mixed(int64_t(share) * size), wide(int64_t(share) * size);
    for (int64_t r = 0; r < rows; ++r) {
        const int length = int(ends[r]) + 1;
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t query = (r * heads + h) * share * size;
            const uint16_t* k = keys + (r * heads + h) * size * capacity;
            const uint16_t* v = values + (r * heads + h) * size * capacity;
            for (int x = 0; x < share * size; ++x) wide[x] = widen(q[query + x]);
            scores_of(scores.data(), wide.data(), k, share, length, capacity, size);
            for (int j = 0; j < share; ++j) soften(&scores[j * capacity], length, scale);
            std::fill(mixed.begin(), mixed.end(), 0.0f);
            int i = 0;
            for (; i + 4 <= length; i += 4) {
                const uint16_t* ahead = v + int64_t(i + AHEAD) * size;
                for (int x = 0; x < 4 * size; x += LINE) __builtin_prefetch(ahead + x);
                for (int j = 0; j < share; ++j)
                    add_four_values(&mixed[j * size], &scores[j * capacity + i], v + int64_t(i) * size, size);
            }
            for (int j = 0; j < share; ++j)
                add_values(&mixed[j * size], &scores[j * capacity + i], v + int64_t(i) * size, length - i, size);
            for (int x = 0; x < share * size; ++x) out[query + x] = narrow(mixed[x]);
        }
    }
}
