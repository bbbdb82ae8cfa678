// Small matrix products on packed blocks that stay in the caches.
#pragma once

#include "simd.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The tile of C held in registers: kTileRows by kTileVectors vectors. Registers also hold one row
// of the tile of B and one element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
#define PERFORMERS_TILE_ROWS 6
#define PERFORMERS_TILE_VECTORS 4
#elif defined(__AVX2__)
#define PERFORMERS_TILE_ROWS 6
#define PERFORMERS_TILE_VECTORS 2
#else
#define PERFORMERS_TILE_ROWS 4
#define PERFORMERS_TILE_VECTORS 2
#endif
constexpr int kTileRows = PERFORMERS_TILE_ROWS, kTileVectors = PERFORMERS_TILE_VECTORS;

// A matrix with one of its strides equal to one.
struct Operand {
    const float *data;
    int64_t stride;
    bool transposed;  // false: element (r, k) at data[r * stride + k]; true: at data[k * stride + r]

    const float *row(int64_t r) const { return data + (transposed ? r : r * stride); }
};

inline Operand rows_of(const float *data, int64_t stride) { return {data, stride, false}; }
inline Operand columns_of(const float *data, int64_t stride) { return {data, stride, true}; }

// Terms of the sums that a tile of C needs: all, or for vector v those before edge + v kWidth, or those
// from there on.
enum class Terms { all, before, from };

template <int kRows, int kVectors, bool kTransposed, Terms kTerms>
inline void tile(const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
                 int64_t c_stride, int64_t inner, bool accumulate, int64_t edge) {
    Vector sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = splat(0.0f);
        }
    }
    const auto add = [&]<int kFirst, int kLast>(int64_t begin, int64_t end)
                         __attribute__((always_inline)) {
        for (int64_t k = begin; k < end; ++k) {
            Vector row[kVectors];
#pragma GCC unroll 8
            for (int v = kFirst; v < kLast; ++v) row[v] = load(b + k * b_stride + v * kWidth);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vector x = splat(kTransposed ? a[k * a_stride + r] : a[r * a_stride + k]);
#pragma GCC unroll 8
                for (int v = kFirst; v < kLast; ++v) sum[r][v] += x * row[v];
            }
        }
    };
    const auto edge_of = [&](int v) {
        return larger<int64_t>(0, smaller(inner, edge + v * kWidth));
    };
    if constexpr (kTerms == Terms::all) {
        add.template operator()<0, kVectors>(0, inner);
    } else if constexpr (kTerms == Terms::from) {
        if constexpr (kVectors > 1) add.template operator()<0, 1>(edge_of(0), edge_of(1));
        if constexpr (kVectors > 2) add.template operator()<0, 2>(edge_of(1), edge_of(2));
        if constexpr (kVectors > 3) add.template operator()<0, 3>(edge_of(2), edge_of(3));
        add.template operator()<0, kVectors>(edge_of(kVectors - 1), inner);
    } else {
        add.template operator()<0, kVectors>(0, edge_of(0));
        if constexpr (kVectors > 1) add.template operator()<1, kVectors>(edge_of(0), edge_of(1));
        if constexpr (kVectors > 2) add.template operator()<2, kVectors>(edge_of(1), edge_of(2));
        if constexpr (kVectors > 3) add.template operator()<3, kVectors>(edge_of(2), edge_of(3));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            float *at = c + r * c_stride + v * kWidth;
            // The products are summed among themselves first: added to a long running sum one by
            // one, each would be rounded to its last place.
            store(at, accumulate ? load(at) + sum[r][v] : sum[r][v]);
        }
    }
}

// Calls f<rows>() with the number of rows, at most kTileRows, as a constant.
template <typename Function>
inline void with_rows(int64_t rows, Function &&f) {
    switch (rows) {
        case 1: return f.template operator()<1>();
        case 2: return f.template operator()<2>();
        case 3: return f.template operator()<3>();
        case 4: return f.template operator()<4>();
#if PERFORMERS_TILE_ROWS == 6
        case 5: return f.template operator()<5>();
        default: return f.template operator()<6>();
#endif
    }
}

// Up to kTileRows rows of C, kVectors vectors wide.
template <int kVectors>
inline void tile_rows(int64_t rows, Operand a, int64_t r, const float *b, int64_t b_stride, float *c,
                      int64_t c_stride, int64_t inner, bool accumulate) {
    with_rows(rows, [&]<int kRows>() __attribute__((always_inline)) {
        if (a.transposed) {
            tile<kRows, kVectors, true, Terms::all>(a.row(r), a.stride, b, b_stride, c, c_stride,
                                                    inner, accumulate, 0);
        } else {
            tile<kRows, kVectors, false, Terms::all>(a.row(r), a.stride, b, b_stride, c, c_stride,
                                                     inner, accumulate, 0);
        }
    });
}

// Which positions meet, for products over the positions of a block of keys and one of queries:
// those whose difference is in [low, high].
struct Band {
    int64_t low, high;

    Band reversed() const { return {-high, -low}; }
};

constexpr int64_t kUnbounded = int64_t{1} << 40;

// What part of a product a banded operand makes necessary: all of it, or for row (or column) i of C
// the terms j of the sum with j - i in the band, which by columns has one end only.
struct Part {
    enum class By { none, row, column } by = By::none;
    Band band = {};
};

inline Part by_row(Band band) { return {Part::By::row, band}; }
inline Part by_column(Band band) { return {Part::By::column, band}; }

constexpr Band kAll = {-kUnbounded, kUnbounded};
// For one causal chunk, where position j of the keys meets position i of the queries if j <= i.
constexpr Band kUpTo = {-kUnbounded, 0}, kFrom = {0, kUnbounded};

template <int kVectors>
inline void strip(int64_t rows, int64_t column, int64_t inner, Operand a, const float *b,
                  int64_t b_stride, float *c, int64_t c_stride, bool accumulate, Part part) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t height = smaller<int64_t>(kTileRows, rows - r);
        int64_t first = 0, last = inner;
        if (part.by == Part::By::row) {
            first = smaller(last, larger(first, r + part.band.low));
            last = larger(first, smaller(last, r + height + part.band.high));
        } else if (part.by == Part::By::column) {
            const bool upper = part.band.low > -kUnbounded;
            const int64_t edge = column + (upper ? part.band.low : kWidth + part.band.high);
            with_rows(height, [&]<int kRows>() {
                const float *rows_of_a = a.row(r), *columns_of_b = b + column;
                float *to = c + r * c_stride + column;
                if (upper) {
                    tile<kRows, kVectors, false, Terms::from>(rows_of_a, a.stride, columns_of_b,
                                                              b_stride, to, c_stride, inner,
                                                              accumulate, edge);
                } else {
                    tile<kRows, kVectors, false, Terms::before>(rows_of_a, a.stride, columns_of_b,
                                                                b_stride, to, c_stride, inner,
                                                                accumulate, edge);
                }
            });
            continue;
        }
        const Operand from = {a.data + (a.transposed ? first * a.stride : first), a.stride,
                              a.transposed};
        tile_rows<kVectors>(height, from, r, b + first * b_stride + column, b_stride,
                            c + r * c_stride + column, c_stride, last - first, accumulate);
    }
}

// Calls f<vectors>() with the number of vectors as a constant.
template <typename Function>
inline void with_width(int64_t vectors, Function &&f) {
    switch (vectors) {
        case 1: return f.template operator()<1>();
#if PERFORMERS_TILE_VECTORS == 4
        case 2: return f.template operator()<2>();
        case 3: return f.template operator()<3>();
#endif
        default: return f.template operator()<PERFORMERS_TILE_VECTORS>();
    }
}

// C (rows, columns) = A (rows, inner) B (inner, columns), or C += A B. Columns are rounded up to
// whole vectors: B and C are padded.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, Operand a, const float *b,
                     int64_t b_stride, float *c, int64_t c_stride, bool accumulate,
                     Part part = {}) {
    const int64_t vectors = (columns + kWidth - 1) / kWidth;
    int64_t v = 0;
    while (v < vectors) {
        const int64_t wide = smaller<int64_t>(kTileVectors, vectors - v), column = v * kWidth;
        with_width(wide, [&]<int kVectors>() {
            strip<kVectors>(rows, column, inner, a, b, b_stride, c, c_stride, accumulate, part);
        });
        v += wide;
    }
}

// C (j, i) = sum_k A (j, k) B (k, i) where j - i is in the band; vectors of C that lie wholly outside
// are not always written.
inline void multiply_band(int64_t rows, int64_t columns, int64_t inner, Operand a, const float *b,
                          int64_t b_stride, float *c, int64_t c_stride, Band band) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t height = smaller<int64_t>(kTileRows, rows - r);
        const int64_t end = smaller(columns, r + height - band.low);
        const int64_t vectors = (end + kWidth - 1) / kWidth;
        for (int64_t v = larger<int64_t>(0, r - band.high) / kWidth; v < vectors;) {
            const int64_t wide = smaller<int64_t>(kTileVectors, vectors - v), column = v * kWidth;
            with_width(wide, [&]<int kVectors>() {
                tile_rows<kVectors>(height, a, r, b + column, b_stride, c + r * c_stride + column,
                                    c_stride, inner, false);
            });
            v += wide;
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
