// Small matrix products on packed blocks that stay in the caches.
#pragma once

#include "simd.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The tile of C held in registers: kTileRows by kTileVectors vectors. Registers also hold one row
// of the tile of B and one element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// A matrix with one of its strides equal to one.
struct Operand {
    const float *data;
    int64_t stride;
    bool transposed;  // false: element (r, k) at data[r * stride + k]; true: at data[k * stride + r]

    const float *at(int64_t r, int64_t k) const {
        return data + (transposed ? k * stride + r : r * stride + k);
    }
};

inline Operand rows_of(const float *data, int64_t stride) { return {data, stride, false}; }
inline Operand columns_of(const float *data, int64_t stride) { return {data, stride, true}; }

// Which positions meet, for products over the positions of a block of keys and one of queries:
// those whose difference is in [low, high].
struct Band {
    int64_t low, high;

    Band reversed() const { return {-high, -low}; }
};

constexpr int64_t kUnbounded = int64_t{1} << 40;
constexpr Band kAll = {-kUnbounded, kUnbounded};

// What part of a product a banded operand makes necessary: all of it, or for row (or column) i of C
// the terms j of the sum with j - i in the band, which by columns has at most one end.
struct Part {
    enum class By { none, row, column } by = By::none;
    Band band = kAll;
};

inline Part by_row(Band band) { return {Part::By::row, band}; }

inline Part by_column(Band band) {
    const bool bounded = band.low > -kUnbounded || band.high < kUnbounded;
    return {bounded ? Part::By::column : Part::By::none, band};
}

// Terms of the sums that a tile of C needs: all, or for vector v those before edge + v kWidth, or those
// from there on.
enum class Terms { all, before, from };

// Calls f<n>() for n in [1, kMost].
template <int kMost, typename Function>
inline void with_constant(int64_t n, Function &&f) {
    if constexpr (kMost > 1) {
        if (n < kMost) return with_constant<kMost - 1>(n, f);
    }
    f.template operator()<kMost>();
}

// C (rows, columns) = A (rows, inner) B (inner, columns), or C += A B. Columns are rounded up to
// whole vectors: B and C are padded.
struct Product {
    int64_t rows, columns, inner;
    Operand a;
    const float *b;
    int64_t b_stride;
    float *c;
    int64_t c_stride;
    bool accumulate;

    // The tile of C at a row and a column, over the terms [begin, end).
    template <int kRows, int kVectors, bool kTransposed, Terms kTerms>
    void tile(int64_t first_row, int64_t column, int64_t begin, int64_t end, int64_t edge) const {
        const float *const left = a.at(first_row, begin), *right = b + begin * b_stride + column;
        float *const to = c + first_row * c_stride + column;
        const int64_t left_stride = a.stride, right_stride = b_stride, to_stride = c_stride;
        const int64_t terms = end - begin;
        const bool more = accumulate;
        Vector sum[kRows][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[r][v] = splat(0.0f);
        }
        const auto add = [&]<int kFirst, int kLast>(int64_t from, int64_t until)
                             __attribute__((always_inline)) {
            for (int64_t k = from; k < until; ++k) {
                Vector row[kVectors];
#pragma GCC unroll 8
                for (int v = kFirst; v < kLast; ++v) {
                    row[v] = load(right + k * right_stride + v * kWidth);
                }
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const Vector x = splat(kTransposed ? left[k * left_stride + r]
                                                       : left[r * left_stride + k]);
#pragma GCC unroll 8
                    for (int v = kFirst; v < kLast; ++v) sum[r][v] += x * row[v];
                }
            }
        };
        const auto edge_of = [&](int v) {
            return larger<int64_t>(0, smaller(terms, edge + v * kWidth));
        };
        if constexpr (kTerms == Terms::all) {
            add.template operator()<0, kVectors>(0, terms);
        } else if constexpr (kTerms == Terms::from) {
            if constexpr (kVectors > 1) add.template operator()<0, 1>(edge_of(0), edge_of(1));
            if constexpr (kVectors > 2) add.template operator()<0, 2>(edge_of(1), edge_of(2));
            if constexpr (kVectors > 3) add.template operator()<0, 3>(edge_of(2), edge_of(3));
            add.template operator()<0, kVectors>(edge_of(kVectors - 1), terms);
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
                float *at = to + r * to_stride + v * kWidth;
                // The products are summed among themselves first: added to a long running sum one by
                // one, each would be rounded to its last place.
                store(at, more ? load(at) + sum[r][v] : sum[r][v]);
            }
        }
    }

    // Up to kTileRows rows of C, kVectors vectors wide.
    template <int kVectors>
    void tile_rows(int64_t r, int64_t column, int64_t begin, int64_t end) const {
        with_constant<kTileRows>(rows - r, [&]<int kRows>() __attribute__((always_inline)) {
            if (a.transposed) {
                tile<kRows, kVectors, true, Terms::all>(r, column, begin, end, 0);
            } else {
                tile<kRows, kVectors, false, Terms::all>(r, column, begin, end, 0);
            }
        });
    }

    template <int kVectors>
    void tile_edge(int64_t r, int64_t column, Band band) const {
        with_constant<kTileRows>(rows - r, [&]<int kRows>() {
            if (band.low > -kUnbounded) {
                tile<kRows, kVectors, false, Terms::from>(r, column, 0, inner, column + band.low);
            } else {
                tile<kRows, kVectors, false, Terms::before>(r, column, 0, inner,
                                                            column + kWidth + band.high);
            }
        });
    }

    template <int kVectors>
    void strip(int64_t column, Part part) const {
        for (int64_t r = 0; r < rows; r += kTileRows) {
            if (part.by == Part::By::column) {
                tile_edge<kVectors>(r, column, part.band);
                continue;
            }
            int64_t first = 0, last = inner;
            if (part.by == Part::By::row) {
                first = smaller(last, larger(first, r + part.band.low));
                const int64_t end = smaller(rows, r + kTileRows);
                last = larger(first, smaller(last, end + part.band.high));
            }
            tile_rows<kVectors>(r, column, first, last);
        }
    }
};

// Calls f<vectors>(v) for the vectors [v, end) in groups as wide as a tile, or less at the end.
template <typename Function>
inline void for_vectors(int64_t v, int64_t end, Function &&f) {
    for (; v < end; v += kTileVectors) {
        with_constant<kTileVectors>(end - v, [&]<int kVectors>() {
            f.template operator()<kVectors>(v * kWidth);
        });
    }
}

inline void multiply(int64_t rows, int64_t columns, int64_t inner, Operand a, const float *b,
                     int64_t b_stride, float *c, int64_t c_stride, bool accumulate,
                     Part part = {}) {
    const Product product = {rows, columns, inner, a, b, b_stride, c, c_stride, accumulate};
    for_vectors(0, (columns + kWidth - 1) / kWidth, [&]<int kVectors>(int64_t column) {
        product.strip<kVectors>(column, part);
    });
}

// C (j, i) = sum_k A (j, k) B (k, i) where j - i is in the band; vectors of C that lie wholly outside
// are not always written.
inline void multiply_band(int64_t rows, int64_t columns, int64_t inner, Operand a, const float *b,
                          int64_t b_stride, float *c, int64_t c_stride, Band band) {
    const Product product = {rows, columns, inner, a, b, b_stride, c, c_stride, false};
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t end = smaller(columns, smaller(rows, r + kTileRows) - band.low);
        const int64_t first = larger<int64_t>(0, r - band.high) / kWidth;
        for_vectors(first, (end + kWidth - 1) / kWidth, [&]<int kVectors>(int64_t column) {
            product.tile_rows<kVectors>(r, column, 0, inner);
        });
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
