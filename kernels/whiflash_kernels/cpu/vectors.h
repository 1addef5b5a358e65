// A register's numbers at a time, in GCC's and Clang's vectors: what a processor has no instruction for they compose.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // vectors of two registers are slow: conversions and shuffles are taken apart
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

template <typename V, typename T>
inline V load(const T* at) {
    V x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

template <typename V, typename T>
inline void store(T* at, V x) {
    std::memcpy(at, &x, sizeof x);
}

inline floats all(float x) { return floats{} + x; }
inline ints ascending() {
    ints x;
    for (int i = 0; i < LANES; ++i) x[i] = i;
    return x;
}
inline floats as_floats(words x) { return load<floats>(&x); }

inline floats larger(floats a, floats b) { return a > b ? a : b; }

inline float largest(floats x) {
    float top = x[0];
    for (int i = 1; i < LANES; ++i) top = std::max(top, x[i]);
    return top;
}

inline float sum(floats x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

// A word is PAIR numbers that are multiplied at once: two of bfloat16 where there is an instruction for it, else one of
// float32. `multiplied` adds the products of one word's numbers with those of LANES words.
#ifdef __AVX512BF16__
constexpr int PAIR = 2;
inline floats multiplied(floats sums, uint32_t a, words b) {
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
}
#else
constexpr int PAIR = 1;
inline floats multiplied(floats sums, uint32_t a, words b) { return sums + load<float>(&a) * as_floats(b); }
#endif

inline halves narrow(floats x) {  // to the nearest bfloat16, ties to even
    words bits = load<words>(&x);
    return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, halves);
}

// 2^x for x <= 0, to 2e-7 of it; 0 below the normal numbers. What is no number stays none.
inline floats power_of_two(floats x) {
    const floats shift = all(12582912.0f);  // adding it rounds to an integer
    const floats nearest = (x + shift) - shift;
    const floats f = x - nearest;
    floats y = all(1.54353139e-4f);
    y = y * f + 1.33335581e-3f;
    y = y * f + 9.61812911e-3f;
    y = y * f + 5.55041087e-2f;
    y = y * f + 2.40226507e-1f;
    y = y * f + 6.93147181e-1f;
    y = y * f + 1.0f;
    const floats safe = x > -126.0f ? nearest : floats{};
    const ints exponent = __builtin_convertvector(safe, ints) << 23;
    ints bits = load<ints>(&y) + exponent;
    return x <= -126.0f ? floats{} : load<floats>(&bits);
}

inline float power_of_two(float x) { return x <= -126.0f ? 0.0f : std::exp2(x); }

// Elements I of a and, from LANES on, of b. GCC has Clang's name for it from 12 on only.
template <int... I>
inline words pick(words a, words b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, words{I...});
#endif
}

// r[i][j] becomes r[j][i]: at every step, pairs of rows a power of two apart exchange half of every group of columns.
#ifdef __AVX512F__
inline void transpose(words (&r)[LANES]) {
    words s[LANES];
    for (int i = 0; i < LANES; i += 2) {
        const words a = r[i], b = r[i + 1];
        s[i] = pick<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(a, b);
        s[i + 1] = pick<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(a, b);
    }
    for (int i = 0; i < LANES; ++i) {
        if (i & 2) continue;
        const words a = s[i], b = s[i + 2];
        r[i] = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b);
        r[i + 2] = pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
    }
    for (int i = 0; i < LANES; ++i) {
        if (i & 4) continue;
        const words a = r[i], b = r[i + 4];
        s[i] = pick<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(a, b);
        s[i + 4] = pick<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(a, b);
    }
    for (int i = 0; i < LANES / 2; ++i) {
        const words a = s[i], b = s[i + 8];
        r[i] = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b);
        r[i + 8] = pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
    }
}
#else
inline void transpose(words (&r)[LANES]) {
    words s[LANES];
    for (int i = 0; i < LANES; i += 2) {
        const words a = r[i], b = r[i + 1];
        s[i] = pick<0, 8, 2, 10, 4, 12, 6, 14>(a, b);
        s[i + 1] = pick<1, 9, 3, 11, 5, 13, 7, 15>(a, b);
    }
    for (int i = 0; i < LANES; ++i) {
        if (i & 2) continue;
        const words a = s[i], b = s[i + 2];
        r[i] = pick<0, 1, 8, 9, 4, 5, 12, 13>(a, b);
        r[i + 2] = pick<2, 3, 10, 11, 6, 7, 14, 15>(a, b);
    }
    for (int i = 0; i < LANES / 2; ++i) {
        const words a = r[i], b = r[i + 4];
        r[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(a, b);
        r[i + 4] = pick<4, 5, 6, 7, 12, 13, 14, 15>(a, b);
    }
}
#endif

}  // namespace
