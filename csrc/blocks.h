// Blocks of rows: from strided arrays of any type to packed float32 and back; scratch layout.
#pragma once

#include <cstddef>

#include "parallel.h"
#include "performers_native.h"
#include "simd.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Positions in a block, and in a chunk of causal attention.
constexpr int64_t kBlock = 64;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Hands out parts of a buffer; over a null buffer it only counts.
class Arena {
public:
    explicit Arena(float *base) : base_(base) {}

    float *take(int64_t count) {
        float *part = base_ ? base_ + used_ : nullptr;
        used_ += static_cast<size_t>(round_up(count, 16));
        return part;
    }

    size_t used() const { return used_; }

private:
    float *base_;
    size_t used_ = 0;
};

// Buffers (a structure built from an arena) in the scratch memory of this thread.
template <typename Made, typename... Arguments>
Made in_scratch(const Arguments &...arguments) {
    Arena counting(nullptr);
    Made counted(counting, arguments...);
    Arena arena(scratch(counting.used()));
    return Made(arena, arguments...);
}

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline void convert(float from, float &to) { to = from; }

inline void convert(BFloat16 from, float &to) {
    to = from_bits(static_cast<uint32_t>(from.bits) << 16);
}

inline void convert(float from, BFloat16 &to) {
    const uint32_t bits = to_bits(from), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    to.bits = static_cast<uint16_t>(from != from ? 0x7fc0 : rounded >> 16);
}

inline void convert(Float16 from, float &to) {
#if defined(__F16C__)
    to = _cvtsh_ss(from.bits);
#else
    const uint32_t sign = static_cast<uint32_t>(from.bits & 0x8000) << 16;
    const uint32_t magnitude = from.bits & 0x7fff;
    uint32_t bits = (magnitude << 13) + 0x38000000;
    if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    // Denormal numbers by their value: as bits they would be denormal here too, and flushed.
    if (magnitude < 0x0400) bits = to_bits(static_cast<float>(magnitude) * 0x1p-24f);
    to = from_bits(sign | bits);
#endif
}

inline void convert(float from, Float16 &to) {
#if defined(__F16C__)
    to.bits = _cvtss_sh(from, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = to_bits(from), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t rounded = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Adding one half aligns the result's last bit with that of a denormal number.
    if (magnitude < 0x38800000) rounded = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    if (magnitude >= 0x477ff000) rounded = 0x7c00;
    if (magnitude > 0x7f800000) rounded = 0x7e00;
    to.bits = static_cast<uint16_t>(sign | rounded);
#endif
}

// Rows of one (batch, head, group) of an array.
struct Rows {
    char *data;
    int64_t row_stride, column_stride;  // in elements
    int64_t type;

    char *row(int64_t r) const {
        return data + r * row_stride * (type == PERFORMERS_FLOAT32 ? 4 : 2);
    }
    // From row r on.
    Rows from(int64_t r) const { return {row(r), row_stride, column_stride, type}; }

    // Calls f with row r, as a pointer to its elements.
    template <typename Function>
    void with_row(int64_t r, Function &&f) const {
        if (type == PERFORMERS_FLOAT32) return f(reinterpret_cast<float *>(row(r)));
        if (type == PERFORMERS_BFLOAT16) return f(reinterpret_cast<BFloat16 *>(row(r)));
        f(reinterpret_cast<Float16 *>(row(r)));
    }
};

inline Rows rows_at(const performers_array &array, int64_t batch, int64_t head, int64_t group) {
    const int64_t *strides = array.strides;
    // As one long row.
    const Rows all = {static_cast<char *>(array.data), 1, strides[4], array.type};
    const int64_t offset = batch * strides[0] + head * strides[1] + group * strides[2];
    return {all.row(offset), strides[3], strides[4], array.type};
}

template <typename From, typename To>
inline void convert_row(const From *from, int64_t from_stride, To *to, int64_t to_stride,
                        int64_t width) {
    if (from_stride == 1 && to_stride == 1) {
        for (int64_t c = 0; c < width; ++c) convert(from[c], to[c]);
    } else {
        for (int64_t c = 0; c < width; ++c) convert(from[c * from_stride], to[c * to_stride]);
    }
}

// Row r, as float32, with zeros from `width` to `padded`.
inline void read(const Rows &rows, int64_t r, int64_t width, int64_t padded, float *to) {
    rows.with_row(r, [&](auto *row) { convert_row(row, rows.column_stride, to, 1, width); });
    for (int64_t c = width; c < padded; ++c) to[c] = 0;
}

inline void write(const Rows &rows, int64_t r, int64_t width, const float *from) {
    rows.with_row(r, [&](auto *row) { convert_row(from, 1, row, rows.column_stride, width); });
}

// Whether none of `count` numbers, whole vectors, is NaN or infinite.
inline bool all_finite(const float *x, int64_t count) {
    constexpr int64_t kSums = 4;  // one would wait for its own additions
    const Vector zero = splat(0.0f);
    Vector sums[kSums] = {zero, zero, zero, zero};
    int64_t i = 0;
    for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
        for (int64_t s = 0; s < kSums; ++s) sums[s] += load(x + i + s * kWidth) * zero;
    }
    for (; i < count; i += kWidth) sums[0] += load(x + i) * zero;
    float lanes[kWidth];
    store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    bool finite = true;
    for (int lane = 0; lane < kWidth; ++lane) finite &= lanes[lane] == 0;
    return finite;
}

// to (columns, kBlock) = the transpose of from (kBlock rows, stride), for columns a multiple of 4
// and `rows` rounded up to whole vectors.
inline void transpose(const float *from, int64_t stride, int64_t rows, int64_t columns, float *to) {
    rows = round_up(rows, kWidth);
    for (int64_t c = 0; c < columns; c += 4) {
        for (int64_t r = 0; r < rows; r += 4) {
            const float *a = from + r * stride + c;
            float *b = to + c * kBlock + r;
#if defined(__SSE2__)
            __m128 w = _mm_loadu_ps(a), x = _mm_loadu_ps(a + stride);
            __m128 y = _mm_loadu_ps(a + 2 * stride), z = _mm_loadu_ps(a + 3 * stride);
            _MM_TRANSPOSE4_PS(w, x, y, z);
            _mm_storeu_ps(b, w);
            _mm_storeu_ps(b + kBlock, x);
            _mm_storeu_ps(b + 2 * kBlock, y);
            _mm_storeu_ps(b + 3 * kBlock, z);
#else
            for (int i = 0; i < 4; ++i) {
                for (int j = 0; j < 4; ++j) b[i * kBlock + j] = a[j * stride + i];
            }
#endif
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
