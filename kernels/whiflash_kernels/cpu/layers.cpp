// What a decoder layer does beside its products and its attention, on a CPU: norm, gated activation, rotation, and
// writing K and V into a pool.
//
// Numbers are bfloat16 or float32 (`kind` 0 or 1); every one is computed in float32 and rounded once. A row's result
// comes from one function that sees nothing but the row, so it depends neither on other rows nor on the number of
// threads. Rows are `*_row` elements apart, numbers of a row contiguous. Few rows are one thread's: to wake others
// takes longer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int64_t ALONE = 1 << 14;  // numbers that one thread works on by itself
constexpr float LOG2E = 1.44269504088896341f;

// `count` numbers, of at most LANES, as float32; zeros behind them.
inline floats get(const float* at, int count) {
    if (count >= LANES) return load<floats>(at);
    floats x{};
    std::memcpy(&x, at, 4 * count);
    return x;
}

inline floats get(const uint16_t* at, int count) {  // a bfloat16 is the upper half of a float32
    halves upper{};
    if (count >= LANES) upper = load<halves>(at);
    else std::memcpy(&upper, at, 2 * count);
    return as_floats(__builtin_convertvector(upper, words) << 16);
}

inline void put(float* at, floats x, int count) {
    std::memcpy(at, &x, count >= LANES ? sizeof x : 4 * count);
}

inline void put(uint16_t* at, floats x, int count) {
    const halves upper = narrow(x);
    std::memcpy(at, &upper, count >= LANES ? sizeof upper : 2 * count);
}

// 1 / (1 + e^-x), from 2 to the power of a number that is not positive.
inline floats sigmoid(floats x) {
    const floats power = power_of_two((x < 0.0f ? x : -x) * LOG2E);
    return (x < 0.0f ? power : all(1.0f)) / (power + 1.0f);
}

template <typename Row>
void each(int rows, int size, Row row) {
#pragma omp parallel for schedule(static) if (int64_t(rows) * size > ALONE)
    for (int r = 0; r < rows; ++r) row(r);
}

template <typename T>
void norm_row(const T* x, const T* added, const T* weight, T* sum_out, T* out, int size, float eps, float offset) {
    static thread_local std::vector<float> memory;
    memory.resize((size + LANES - 1) / LANES * LANES);
    float* const wide = memory.data();
    floats squares{};
    for (int i = 0; i < size; i += LANES) {
        floats value = get(x + i, size - i);
        if (added) {
            value += get(added + i, size - i);
            put(sum_out + i, value, size - i);
        }
        store(wide + i, value);
        squares += value * value;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
    for (int i = 0; i < size; i += LANES)
        put(out + i, load<floats>(wide + i) * scale * (get(weight + i, size - i) + offset), size - i);
}

template <typename T>
void norm(const void* x, int64_t x_row, const void* added, int64_t added_row, const void* weight, void* sum_out,
          void* out, int rows, int size, float eps, float offset) {
    each(rows, size, [=](int r) {
        norm_row(static_cast<const T*>(x) + r * x_row, added ? static_cast<const T*>(added) + r * added_row : nullptr,
                 static_cast<const T*>(weight), static_cast<T*>(sum_out) + int64_t(r) * size,
                 static_cast<T*>(out) + int64_t(r) * size, size, eps, offset);
    });
}

template <typename T>
void activate(const void* x, int64_t x_row, void* out, int rows, int size) {
    each(rows, 8 * size, [=](int r) {  // an exponential takes as long as eight other numbers
        const T* const gate = static_cast<const T*>(x) + r * x_row;
        T* const to = static_cast<T*>(out) + int64_t(r) * size;
        for (int i = 0; i < size; i += LANES) {
            const floats value = get(gate + i, size - i);
            put(to + i, value * sigmoid(value) * get(gate + size + i, size - i), size - i);
        }
    });
}

struct Heads {
    void* x;
    int64_t row, head;
    int heads;
};

template <typename T, typename A>
void rotate_heads(const Heads& of, int r, const A* angles, int half) {
    for (int h = 0; h < of.heads; ++h) {
        T* const first = static_cast<T*>(of.x) + r * of.row + h * of.head;
        T* const second = first + half;
        for (int i = 0; i < half; i += LANES) {
            const floats a = get(first + i, half - i), b = get(second + i, half - i);
            const floats cosine = get(angles + i, half - i), sine = get(angles + half + i, half - i);
            put(first + i, a * cosine - b * sine, half - i);
            put(second + i, b * cosine + a * sine, half - i);
        }
    }
}

template <typename T, typename A>
void rotate(const Heads& q, const Heads& k, const void* table, const int64_t* at, int rows, int half) {
    each(rows, (q.heads + k.heads) * 2 * half, [=](int r) {
        const A* const angles = static_cast<const A*>(table) + (at ? at[r] : r) * 2 * half;
        rotate_heads<T>(q, r, angles, half);
        rotate_heads<T>(k, r, angles, half);
    });
}

bool within(const int64_t* at, int rows, int64_t size) {
    return std::all_of(at, at + rows, [=](int64_t i) { return i >= 0 && i < size; });
}

}  // namespace

extern "C" int whiflash_threads() { return omp_get_max_threads(); }

// out = x / rms(x) * (weight + offset); with `added`, of x + added, which goes to sum_out. x, added [rows, size].
extern "C" void whiflash_norm(int kind, const void* x, int64_t x_row, const void* added, int64_t added_row,
                              const void* weight, void* sum_out, void* out, int rows, int size, float eps,
                              float offset) {
    (kind ? norm<float> : norm<uint16_t>)(x, x_row, added, added_row, weight, sum_out, out, rows, size, eps, offset);
}

// out [rows, size] = silu(gate) * up of x = [gate | up], [rows, 2 * size].
extern "C" void whiflash_activate(int kind, const void* x, int64_t x_row, void* out, int rows, int size) {
    (kind ? activate<float> : activate<uint16_t>)(x, x_row, out, rows, size);
}

// Pairs (i, i + half) of heads of q and k [rows, heads, >= 2 * half], turned in place by table[at[r]] = [cosine | sine];
// without `at`, row r by table[r]. False, and nothing done, where one of `at` is not a row of the table.
extern "C" int whiflash_rotate(int kind, int table_kind, void* q, int64_t q_row, int64_t q_head, int q_heads, void* k,
                               int64_t k_row, int64_t k_head, int k_heads, const void* table, int64_t table_rows,
                               const int64_t* at, int rows, int half) {
    if (at && !within(at, rows, table_rows)) return false;
    const Heads queries{q, q_row, q_head, q_heads}, keys{k, k_row, k_head, k_heads};
    const auto of_bfloat16 = table_kind ? rotate<uint16_t, float> : rotate<uint16_t, uint16_t>;
    const auto of_float = table_kind ? rotate<float, float> : rotate<float, uint16_t>;
    (kind ? of_float : of_bfloat16)(queries, keys, table, at, rows, half);
    return true;
}

// Rows of k and v, `*_row` bytes apart, to two pools of `slots` slots of `*_size` bytes. False, and nothing done, where
// one of `at` is not a slot.
extern "C" int whiflash_keep(const char* k, int64_t k_row, char* k_pool, int64_t k_size, const char* v, int64_t v_row,
                             char* v_pool, int64_t v_size, const int64_t* at, int rows, int64_t slots) {
    if (!within(at, rows, slots)) return false;
    for (int r = 0; r < rows; ++r) {
        std::memcpy(k_pool + at[r] * k_size, k + r * k_row, k_size);
        std::memcpy(v_pool + at[r] * v_size, v + r * v_row, v_size);
    }
    return true;
}
