// From rows to features. Features of a block are kept feature by feature, (features, kBlock): then
// projections, products with the running sums and those between positions all read packed rows,
// and what belongs to a position (norms, maxima, normalisers) lies along the vectors.
#pragma once

#include "gemm.h"
#include "problem.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Features that are computed, used and forgotten together: a panel stays in the first cache.
constexpr int64_t kPanel = 48;

// For `count` keys from `begin` on, up to whole vectors: one for those that take part and are not
// before `first`, else zero.
inline void keep_keys(const uint8_t *mask, int64_t begin, int64_t count, float *keep, int64_t first) {
    for (int64_t r = 0; r < round_up(count, kWidth); ++r) {
        const bool there = r < count && begin + r >= first;
        keep[r] = there && (!mask || mask[begin + r]) ? 1.0f : 0.0f;
    }
}

// Up to kBlock rows of queries or keys. Rows past the end, and masked keys, are zero.
struct Block : Buffers {
    using Buffers::Buffers;

    float *x = arena.take(kBlock * p.padded_dim);  // (kBlock, padded_dim)
    // (weight_stride, kBlock): with rows for the bias and the norm
    float *transposed = arena.take(p.weight_stride * kBlock);
    int64_t rows = 0, inner = 0;  // inner: columns of the weights that meet these

    void load_queries(const Rows &from, int64_t begin, int64_t count) {
        load_rows(from, count, [&](int64_t r) { return begin + r; });
    }

    // Row index(r) of `from` as row r, or zeros where that is negative.
    template <typename Index>
    void load_rows(const Rows &from, int64_t count, Index &&index) {
        rows = count;
        inner = p.query_inner;
        const int64_t used = round_up(rows, kWidth);
        for (int64_t r = 0; r < used; ++r) {
            const int64_t row = r < rows ? index(r) : -1;
            read(from, row, row < 0 ? 0 : p.head_dim, p.padded_dim, x + r * p.padded_dim);
        }
        p.check(x, used * p.padded_dim);
        transpose(x, p.padded_dim, rows, p.padded_dim, transposed);
        if (!p.call.bias) return;
        for (int64_t r = 0; r < used; ++r) transposed[p.head_dim * kBlock + r] = 1;
    }

    // `keep` (kBlock) becomes one for keys that take part, zero for others and for rows before
    // `first`.
    void load_keys(const Rows &from, const uint8_t *mask, int64_t begin, int64_t count, float *keep,
                   int64_t first = 0) {
        keep_keys(mask, begin, count, keep, first);
        load_rows(from, count, [&](int64_t r) { return keep[r] != 0 ? begin + r : -1; });
        inner = p.key_inner;
        if (p.exponential) norms(keep);
    }

    // For queries beside exact pairs: the binary logarithm of the factor that their features lack,
    // normalizer exp(-scale |q|^2 / 2).
    void offsets(float *to) const {
        for (int64_t r = 0; r < rows; r += kWidth) {
            store(to + r, splat(p.log_normalizer) - squared_norm(r));
        }
    }

private:
    // |norm_root x|^2 of the rows from r on.
    Vector squared_norm(int64_t r) const {
        Vector sum = splat(0.0f);
        for (int64_t c = 0; c < p.head_dim; ++c) {
            const Vector y = load(transposed + c * kBlock + r) * p.norm_root;
            sum += y * y;
        }
        return sum;
    }

    // An infinite norm gives a key features of zero: one that takes no part, and one so long that
    // its norm overflows, whose projections must not be infinite then.
    void norms(const float *keep) const {
        float *to = transposed + p.query_inner * kBlock;
        const int64_t used = round_up(rows, kWidth);
        for (int64_t r = 0; r < used; r += kWidth) {
            store(to + r, p.norm_root != 0 ? squared_norm(r) : splat(0.0f));
        }
        for (int64_t r = 0; r < used; ++r) {
            if (keep[r] == 0) to[r] = kInfinity;
            if (to[r] != kInfinity) continue;
            for (int64_t c = 0; c < p.head_dim; ++c) transposed[c * kBlock + r] = 0;
        }
    }
};

// Values or output gradients: rows of value_dim, zero past the end and where `keep` is zero.
inline void load_values(const Problem &p, const Rows &from, int64_t begin, int64_t rows,
                        const float *keep, float *to) {
    for (int64_t r = 0; r < round_up(rows, kWidth); ++r) {
        const bool there = r < rows && (!keep || keep[r] != 0);
        read(from, begin + r, there ? p.value_dim : 0, p.padded_value, to + r * p.padded_value);
    }
    p.check(to, round_up(rows, kWidth) * p.padded_value);
}

// A block of keys and their values.
struct KeyBlock : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    float *value = arena.take(kBlock * p.padded_value), *keep = arena.take(kBlock);
    float *value_transposed = arena.take(p.padded_value * kBlock);  // by the next

    void transpose_values() const {
        transpose(value, p.padded_value, block.rows, p.padded_value, value_transposed);
    }

    // Those that take no part, and rows before `first`, are zero.
    void load_keys(int64_t head, int64_t begin, int64_t rows, int64_t first = 0) {
        block.load_keys(p.rows(p.call.key, head), p.mask(head), begin, rows, keep, first);
        load_values(p, p.rows(p.call.value, head), begin, rows, keep, value);
    }
};

// Rows [first, first + count) of W x + b, less the norm for keys: (count, kBlock).
inline void project(const Problem &p, int64_t head, const Block &block, int64_t first, int64_t count,
                    float *to) {
    const float *weights = p.weights_of(head) + first * p.weight_stride;
    multiply(count, block.rows, block.inner, rows_of(weights, p.weight_stride), block.transposed,
             kBlock, to, kBlock, false);
}

// Whole vectors times a factor.
inline void scale_vectors(float *row, int64_t count, float factor) {
    for (int64_t c = 0; c < count; c += kWidth) store(row + c, load(row + c) * splat(factor));
}

// Products with a panel (n, kBlock): features of a block of rows, their gradients, or pairs with n
// keys.
// to (n, width) = panel (n, rows) x (rows, width).
inline void sum_rows(int64_t width, int64_t n, int64_t rows, const float *panel, const float *x,
                     float *to, bool accumulate, Part part = {}) {
    multiply(n, width, rows, rows_of(panel, kBlock), x, width, to, width, accumulate, part);
}

// to (rows, width) = the transpose of panel (n, rows) x (n, width).
inline void combine(int64_t width, int64_t rows, int64_t n, const float *panel, const float *x,
                    float *to, bool accumulate, Part part = {}) {
    multiply(rows, width, n, columns_of(panel, kBlock), x, width, to, width, accumulate, part);
}

// panel (n, rows) = value (n, value_dim) transposed (value_dim, rows).
inline void value_products(const Problem &p, int64_t n, int64_t rows, const float *value,
                           const float *transposed, float *panel) {
    multiply(n, rows, p.value_dim, rows_of(value, p.padded_value), transposed, kBlock, panel, kBlock,
             false);
}

// Sums over keys: key_value (features, padded_value), key_sum and log_scale (features), one block
// of memory.
struct Sums {
    const Problem *p;
    float *key_value, *key_sum, *log_scale;

    Sums(const Problem &p, float *memory)
        : p(&p),
          key_value(memory),
          key_sum(memory + p.features * p.padded_value),
          log_scale(key_sum + p.features) {}
    Sums(Arena &arena, const Problem &p) : Sums(p, arena.take(size(p))) {}

    static int64_t size(const Problem &p) { return p.features * (p.padded_value + 2); }

    float *row(int64_t f) const { return key_value + f * p->padded_value; }

    void clear() const {
        for (int64_t i = 0; i < p->features * (p->padded_value + 1); ++i) key_value[i] = 0;
        for (int64_t f = 0; f < p->features; ++f) log_scale[f] = p->exponential ? -kInfinity : 0.0f;
    }

    void scale_row(int64_t f, float factor) const {
        scale_vectors(row(f), p->padded_value, factor);
        key_sum[f] *= factor;
    }

    void copy(const Sums &from) const {
        std::memcpy(key_value, from.key_value, sizeof(float) * static_cast<size_t>(size(*p)));
    }

    // Adds sums at the same scales.
    void add(const Sums &other) const {
        for (int64_t i = 0; i < p->features * (p->padded_value + 1); ++i) {
            key_value[i] += other.key_value[i];
        }
    }

    // Adds the sums over other keys, at their scales.
    void merge(const Sums &other) const {
        for (int64_t f = 0; f < p->features; ++f) {
            const float scale = larger(log_scale[f], other.log_scale[f]);
            const float mine = decay(log_scale[f], scale);
            const float theirs = decay(other.log_scale[f], scale);
            float *to = row(f);
            const float *more = other.row(f);
            for (int64_t c = 0; c < p->padded_value; ++c) to[c] = to[c] * mine + more[c] * theirs;
            key_sum[f] = key_sum[f] * mine + other.key_sum[f] * theirs;
            log_scale[f] = scale;
        }
    }

    // From and to the contiguous tensors of a call; `unit` is what one unit of the log scale here, or
    // there, is in the other. A null tensor is zero, or not written.
    void read(const performers_sums &from, int64_t head, float unit = 1) const {
        clear();
        for (int64_t f = 0; f < p->features; ++f) {
            const int64_t at = head * p->features + f;
            if (from.key_value) copy_values(from.key_value + at * p->value_dim, row(f));
            if (from.key_sum) key_sum[f] = from.key_sum[at];
            if (from.log_scale) log_scale[f] = from.log_scale[at] * unit;
        }
    }

    void write(const performers_sums &to, int64_t head, float unit = 1) const {
        for (int64_t f = 0; f < p->features; ++f) {
            const int64_t at = head * p->features + f;
            if (to.key_value) copy_values(row(f), to.key_value + at * p->value_dim);
            if (to.key_sum) to.key_sum[at] = key_sum[f];
            if (to.log_scale) to.log_scale[at] = log_scale[f] * unit;
        }
    }

private:
    void copy_values(const float *from, float *to) const {
        std::memcpy(to, from, sizeof(float) * static_cast<size_t>(p->value_dim));
    }
};

// Zeros in pairs (keys, kBlock queries) outside a band, and up to whole vectors.
inline void clear_outside(float *pairs, int64_t keys, int64_t rows, Band band) {
    const int64_t used = round_up(rows, kWidth);
    for (int64_t t = 0; t < keys; ++t) {
        float *row = pairs + t * kBlock;
        const int64_t from = smaller(used, larger<int64_t>(0, t - band.high));
        const int64_t to = larger(from, smaller(rows, t - band.low + 1));
        for (int64_t s = 0; s < from; ++s) row[s] = 0;
        for (int64_t s = to; s < used; ++s) row[s] = 0;
    }
}

// pairs (keys, kBlock queries) = features (features, keys) . queries (features, rows), in the band.
inline void feature_pairs(const Problem &p, int64_t keys, int64_t rows, const float *features,
                          const float *queries, Band band, float *pairs) {
    multiply_band(keys, rows, p.features, columns_of(features, kBlock), queries, kBlock, pairs, kBlock,
                  band);
    clear_outside(pairs, keys, rows, band);
}

// Adds rows of (count, kBlock) to each other, and to `sums` (kBlock).
inline void add_up(const float *from, int64_t count, int64_t rows, float *sums) {
    for (int64_t r = 0; r < rows; r += kWidth) {
        Vector sum = load(sums + r);
        for (int64_t i = 0; i < count; ++i) sum += load(from + i * kBlock + r);
        store(sums + r, sum);
    }
}

// The largest of `lowest` and the exponents of one feature over a block, in each lane.
inline Vector peaks(const float *exponents, int64_t rows, float lowest) {
    Vector peak = splat(lowest);
    for (int64_t r = 0; r < rows; r += kWidth) peak = maximum(peak, load(exponents + r));
    return peak;
}

// Exponents of one feature over a block become features at a scale. Returns their sum.
inline float exponentiate(float *exponents, int64_t rows, float log_scale) {
    const Vector scale = splat(finite(log_scale));
    Vector sum = splat(0.0f);
    for (int64_t r = 0; r < rows; r += kWidth) {
        const Vector phi = exp2(load(exponents + r) - scale);
        store(exponents + r, phi);
        sum += phi;
    }
    return total(sum);
}

inline float sum_feature(const float *features, int64_t rows) {
    Vector sum = splat(0.0f);
    for (int64_t r = 0; r < rows; r += kWidth) sum += load(features + r);
    return total(sum);
}

// Rectified features of projections, in place.
inline void rectify(const Problem &p, float *features, int64_t count, int64_t rows,
                    const float *keep) {
    const Vector zero = splat(0.0f), epsilon = splat(p.epsilon);
    for (int64_t f = 0; f < count; ++f) {
        for (int64_t r = 0; r < rows; r += kWidth) {
            float *at = features + f * kBlock + r;
            const Vector phi = maximum(zero, load(at)) + epsilon;
            store(at, keep ? phi * load(keep + r) : phi);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
