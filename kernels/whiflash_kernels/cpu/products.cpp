// Products of bfloat16 rows with a bfloat16 matrix on a CPU that has AVX2 and no instruction for bfloat16:
//
//     out[m, n] = round(sum_k x[m, k] * w[n, k] + bias[n])
//
//     x    [M, K]  rows `x_row` elements apart      w  [N, K]  contiguous
//     bias [N] or null                              out [M, N]  contiguous, aliases nothing
//
// Sums are float32: eight partial sums in the order of k, added pairwise at the end. How rows and columns are shared
// between threads and tiles touches no sum, so a row's output does not depend on what is multiplied beside it.
//
// A thread takes `BLOCK` rows of w at a time, widens them to float32 once (a shift), and multiplies them with tiles of
// `ROWS` rows of x: twelve sums in registers, for seven loads. Of one tile alone it widens them as it multiplies.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

constexpr int LANES = 8, ROWS = 3, COLUMNS = 4, BLOCK = 16, LINE = 64;

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

inline float sum(floats x) {
    typedef float quad __attribute__((vector_size(16)));
    quad low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    low += high;
    return (low[0] + low[2]) + (low[1] + low[3]);
}

inline floats load(const float* at) {
    floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline floats load(const uint16_t* at) {  // a bfloat16 is the upper half of a float32
    halves upper;
    std::memcpy(&upper, at, sizeof upper);
    const words bits = __builtin_convertvector(upper, words) << 16;
    floats x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float widened(uint16_t upper) {
    const uint32_t bits = uint32_t(upper) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint16_t rounded(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16) | 0x40;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// `size` numbers as float32, and zeros up to `padded`.
void widen(const uint16_t* from, int size, int padded, float* to) {
    int i = 0;
    for (; i + LANES <= size; i += LANES) {
        const floats wide = load(from + i);
        std::memcpy(to + i, &wide, sizeof wide);
    }
    for (; i < padded; ++i) to[i] = i < size ? widened(from[i]) : 0.0f;
}

struct Product {
    const float* x;  // [M, padded]
    const uint16_t* w;
    const uint16_t* bias;
    uint16_t* out;
    int rows, columns, size, padded;
};

template <int M, int N, typename T>
void tile(const Product& of, int row, int column, const T* w) {
    const float* x = of.x + int64_t(row) * of.padded;
    floats sums[M][N] = {};
    for (int k = 0; k < of.padded; k += LANES) {
        floats right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) right[n] = load(w + int64_t(n) * of.padded + k);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const floats left = load(x + int64_t(m) * of.padded + k);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[m][n] += left * right[n];
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            const float bias = of.bias ? widened(of.bias[column + n]) : 0.0f;
            of.out[int64_t(row + m) * of.columns + column + n] = rounded(sum(sums[m][n]) + bias);
        }
}

// Rows of the matrix that come next, asked of the memory a few lines at every tile, while that is multiplied.
struct Ahead {
    const char *at, *end;
    int64_t share;

    void ask() {
        for (const char* const stop = std::min(at + share, end); at < stop; at += LINE) __builtin_prefetch(at);
    }
};

// N columns of the output. w: their rows of the matrix, `padded` numbers each.
template <int N, typename T>
void strip(const Product& of, int column, const T* w, Ahead& ahead) {
    int row = 0;
    for (; row + ROWS <= of.rows; row += ROWS) {
        ahead.ask();
        tile<ROWS, N>(of, row, column, w);
    }
    if (of.rows - row == 2) tile<2, N>(of, row, column, w);
    if (of.rows - row == 1) tile<1, N>(of, row, column, w);
}

template <typename T>
void strips(const Product& of, int column, int columns, const T* w, Ahead ahead) {
    int n = 0;
    for (; n + COLUMNS <= columns; n += COLUMNS) strip<COLUMNS>(of, column + n, w + int64_t(n) * of.padded, ahead);
    for (; n < columns; ++n) strip<1>(of, column + n, w + int64_t(n) * of.padded, ahead);
}

void block(const Product& of, int column, int columns, float* wide) {
    const uint16_t* w = of.w + int64_t(column) * of.size;
    if (of.rows <= ROWS && of.padded == of.size) return strips(of, column, columns, w, {});
    for (int n = 0; n < columns; ++n)
        widen(w + int64_t(n) * of.size, of.size, of.padded, wide + int64_t(n) * of.padded);
    const int next = std::min(BLOCK, of.columns - column - columns), tiles = (of.rows / ROWS) * (columns / COLUMNS);
    const auto begin = reinterpret_cast<const char*>(w + int64_t(columns) * of.size);
    const int64_t bytes = int64_t(next) * of.size * sizeof *w, lines = bytes / LINE / std::max(1, tiles) + 1;
    strips(of, column, columns, wide, {begin, begin + bytes, lines * LINE});
}

}  // namespace

extern "C" int whiflash_threads() { return omp_get_max_threads(); }

extern "C" void whiflash_product(const uint16_t* x, int64_t x_row, const uint16_t* w, const uint16_t* bias,
                                 uint16_t* out, int rows, int columns, int size) {
    static thread_local std::vector<float> wide;
    const int padded = (size + LANES - 1) / LANES * LANES;
    wide.resize(size_t(rows) * padded);
    float* const left = wide.data();
    const Product of{left, w, bias, out, rows, columns, size, padded};
#pragma omp parallel
    {
        static thread_local std::vector<float> own;
        own.resize(size_t(BLOCK) * padded);
#pragma omp for schedule(static)
        for (int m = 0; m < rows; ++m) widen(x + m * x_row, size, padded, left + int64_t(m) * padded);
#pragma omp for schedule(static)
        for (int n = 0; n < columns; n += BLOCK) block(of, n, std::min(BLOCK, columns - n), own.data());
    }
}
