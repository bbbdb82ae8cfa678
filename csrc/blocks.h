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

inline float from_bfloat16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = to_bits(x);
    if (x != x) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Denormal numbers by their value: as bits they would be denormal here too, and flushed.
    if (magnitude < 0x0400) {
        return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
    }
    return from_bits(sign | ((magnitude << 13) + 0x38000000));
#endif
}

inline uint16_t to_float16(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Adding one half aligns the result's last bit with that of a denormal number.
        const uint32_t aligned = to_bits(from_bits(magnitude) + 0.5f);
        return static_cast<uint16_t>(sign | (aligned - 0x3f000000));
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + odd) >> 13);
#endif
}

// Rows of one (batch, head, group) of an array.
struct Rows {
    char *data;
    int64_t row_stride, column_stride;  // in elements
    int64_t type;

    int64_t element_size() const { return type == PERFORMERS_FLOAT32 ? 4 : 2; }
    char *row(int64_t r) const { return data + r * row_stride * element_size(); }
};

inline Rows rows_at(const performers_array &array, int64_t batch, int64_t head, int64_t group) {
    Rows rows = {nullptr, array.strides[3], array.strides[4], array.type};
    const int64_t offset =
        batch * array.strides[0] + head * array.strides[1] + group * array.strides[2];
    rows.data = static_cast<char *>(array.data) + offset * rows.element_size();
    return rows;
}

template <typename Element, typename Convert>
inline void read_row(const char *row, int64_t stride, int64_t width, float *to, Convert convert) {
    const Element *from = reinterpret_cast<const Element *>(row);
    if (stride == 1) {
        for (int64_t c = 0; c < width; ++c) to[c] = convert(from[c]);
    } else {
        for (int64_t c = 0; c < width; ++c) to[c] = convert(from[c * stride]);
    }
}

template <typename Element, typename Convert>
inline void write_row(char *row, int64_t stride, int64_t width, const float *from,
                      Convert convert) {
    Element *to = reinterpret_cast<Element *>(row);
    if (stride == 1) {
        for (int64_t c = 0; c < width; ++c) to[c] = convert(from[c]);
    } else {
        for (int64_t c = 0; c < width; ++c) to[c * stride] = convert(from[c]);
    }
}

inline float unchanged(float x) { return x; }

// Row r, as float32, with zeros from `width` to `padded`.
inline void read(const Rows &rows, int64_t r, int64_t width, int64_t padded, float *to) {
    const char *row = rows.row(r);
    if (rows.type == PERFORMERS_FLOAT32 && rows.column_stride == 1) {
        std::memcpy(to, row, sizeof(float) * static_cast<size_t>(width));
    } else if (rows.type == PERFORMERS_FLOAT32) {
        read_row<float>(row, rows.column_stride, width, to, unchanged);
    } else if (rows.type == PERFORMERS_BFLOAT16) {
        read_row<uint16_t>(row, rows.column_stride, width, to, from_bfloat16);
    } else {
        read_row<uint16_t>(row, rows.column_stride, width, to, from_float16);
    }
    for (int64_t c = width; c < padded; ++c) to[c] = 0;
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

inline void write(const Rows &rows, int64_t r, int64_t width, const float *from) {
    char *row = rows.row(r);
    if (rows.type == PERFORMERS_FLOAT32) {
        write_row<float>(row, rows.column_stride, width, from, unchanged);
    } else if (rows.type == PERFORMERS_BFLOAT16) {
        write_row<uint16_t>(row, rows.column_stride, width, from, to_bfloat16);
    } else {
        write_row<uint16_t>(row, rows.column_stride, width, from, to_float16);
    }
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
