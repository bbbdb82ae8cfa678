// One vector of floats, as wide as the instruction set it is compiled for. GCC's and Clang's vector
// extensions do the arithmetic (and serve every processor); intrinsics only what they cannot say.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace performers::PERFORMERS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kWidth * sizeof(int32_t))));

template <typename Number>
inline Number smaller(Number a, Number b) {
    return b < a ? b : a;
}

template <typename Number>
inline Number larger(Number a, Number b) {
    return a < b ? b : a;
}

inline Vector load(const float *from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float *to, Vector x) { std::memcpy(to, &x, sizeof x); }

inline Vector splat(float x) { return x - Vector{}; }

// The larger; NaN where b is NaN.
inline Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// The smaller; NaN where b is NaN.
inline Vector minimum(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

inline float largest(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float result = -__builtin_inff();
    for (int i = 0; i < kWidth; ++i) result = x[i] > result ? x[i] : result;
    return result;
#endif
}

inline float total(Vector x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float result = x[0];
    for (int i = 1; i < kWidth; ++i) result += x[i];
    return result;
#endif
}

// Whether any lane of a exceeds that of b.
inline bool any_greater(Vector a, Vector b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
    const Integers greater = a > b;
    int32_t any = 0;
    for (int i = 0; i < kWidth; ++i) any |= greater[i];
    return any != 0;
#endif
}

// 2^x within 2 units in the last place for -126 <= x <= 127, zero below, NaN for NaN; meaningless
// above.
inline Vector exp2(Vector x) {
    // Two to the fraction, by a polynomial with the least relative error on [-1/2, 1/2].
    constexpr float c[] = {1.0f,          6.931472e-1f,  2.4022647e-1f, 5.5503286e-2f,
                           9.618489e-3f, 1.3399931e-3f, 1.5345812e-4f};
#if defined(__AVX512F__)
    x = maximum(splat(-200.0f), x);
    const Vector whole = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    x = maximum(splat(-127.0f), x);
#if defined(__AVX2__)
    const Vector whole = (Vector)_mm256_round_ps(
        (__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // Adding and subtracting 1.5 * 2^23 rounds to a whole number.
    const Vector shift = splat(12582912.0f);
    const Vector whole = (x + shift) - shift;
#endif
#endif
    const Vector r = x - whole;
    Vector y = splat(c[6]);
    for (int i = 5; i >= 0; --i) y = y * r + splat(c[i]);
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    // Built from exponent bits; -127 gives the bits of zero.
    const Integers bits = (__builtin_convertvector(whole, Integers) + 127) << 23;
    return y * (Vector)bits;
#endif
}

// Denormal numbers count as zero while an object of this class lives: arithmetic with them is slow
// on many processors, and nothing here depends on them.
class FlushDenormals {
public:
#if defined(__SSE2__)
    FlushDenormals() : control_(_mm_getcsr()) { _mm_setcsr(control_ | 0x8040u); }
    ~FlushDenormals() { _mm_setcsr(control_); }

private:
    unsigned control_;
#else
    FlushDenormals() {}
#endif
};

}  // namespace
}  // namespace performers::PERFORMERS_ISA
