// From rows to features. Features of a block are kept feature by feature, (features, kBlock): then
// projections, products with the running sums and those between positions all read packed rows,
// and what belongs to a position (norms, maxima, normalisers) lies along the vectors.
//
// Exponents are binary: 2^x needs no constants to reduce its argument.
#pragma once

#include "blocks.h"
#include "gemm.h"

namespace performers::PERFORMERS_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.69314718f;
constexpr float kInfinity = __builtin_inff();
// Where maxima of exponents begin: less than any, but not infinite, so that differences are numbers.
constexpr float kLowest = -3e38f;

// Features that are computed, used and forgotten together: a panel stays in the first cache.
constexpr int64_t kPanel = 48;

inline float finite(float scale) { return scale == -kInfinity ? 0.0f : scale; }

inline float exp2(float x) { return exp2(splat(x))[0]; }

inline float inverse_of(float normaliser) { return normaliser == 0 ? 0.0f : 1 / normaliser; }

// What a sum at scale `before` is multiplied with to stand at scale `after` >= before.
inline float decay(float before, float after) {
    return before == after ? 1.0f : exp2(before - after);
}

// Positions of queries of one sequence: all of it, or a part. `first` and `last` bound the keys of
// the sequence.
struct Span {
    int64_t begin, end;
    int64_t first, last;
};

// Sizes and packed weights of one call.
struct Problem {
    const performers_call &call;
    bool exponential;
    bool exact;      // whether features are summed beside exact pairs
    bool strict;     // whether the keys that a causal query meets through features end before...
    int64_t shift;   // ...or at row i + shift, for query i
    int64_t window;  // reach of exact pairs, or -1
    int64_t heads;  // batch times key heads
    int64_t features, head_dim, value_dim;
    int64_t padded_dim, padded_value;  // rows of packed blocks
    int64_t weight_stride;
    int64_t query_inner, key_inner;  // columns of the weights that meet queries, and keys
    float norm_root;  // |norm_root x|^2 is what a key's exponents lose
    float epsilon;
    float log_normalizer;
    float *weights = nullptr;  // (weight_heads, features, weight_stride)
    // Whether NaN or infinity was among the rows that were read; set by any task.
    mutable bool nonfinite = false;

    explicit Problem(const performers_call &call) : call(call) {
        exponential = call.kind == PERFORMERS_EXPONENTIAL;
        window = smaller(call.window, call.length + call.size);
        strict = window >= 0;
        exact = strict || call.sinks > 0 || call.part != PERFORMERS_WHOLE;
        shift = strict ? call.offset - window : 0;
        heads = call.batch * call.key_heads;
        features = call.features;
        head_dim = call.head_dim;
        value_dim = call.value_dim;
        padded_dim = round_up(head_dim, kWidth);
        padded_value = round_up(value_dim, kWidth);
        weight_stride = round_up(head_dim + 2, kWidth);
        query_inner = head_dim + (call.bias ? 1 : 0);
        key_inner = query_inner + (exponential ? 1 : 0);
        norm_root = call.quadratic ? static_cast<float>(std::sqrt(call.scale * kLog2e / 2)) : 0.0f;
        epsilon = static_cast<float>(call.epsilon);
        log_normalizer = exact ? static_cast<float>(std::log2(call.normalizer)) : 0.0f;
    }

    // Looks at rows that were read.
    void check(const float *x, int64_t count) const {
        if (!all_finite(x, count)) __atomic_store_n(&nonfinite, true, __ATOMIC_RELAXED);
    }

    int64_t batch_of(int64_t head) const { return head / call.key_heads; }
    int64_t key_head_of(int64_t head) const { return head % call.key_heads; }

    const float *weights_of(int64_t head) const {
        const int64_t which = call.weight_heads == 1 ? 0 : key_head_of(head);
        return weights + which * features * weight_stride;
    }

    int64_t weight_rows() const { return call.weight_heads * features; }

    // Row r of the packed weights: W sqrt(scale) in units of the exponent, the bias, and -1, which
    // meets the norm of a key.
    void pack_weight(int64_t r) const {
        const double unit = exponential ? kLog2e : 1.0, root = std::sqrt(call.scale) * unit;
        float *row = weights + r * weight_stride;
        for (int64_t c = 0; c < head_dim; ++c) {
            row[c] = static_cast<float>(call.weight[r * head_dim + c] * root);
        }
        for (int64_t c = head_dim; c < weight_stride; ++c) row[c] = 0;
        if (call.bias) row[head_dim] = static_cast<float>(call.bias[r] * unit);
        if (exponential) row[query_inner] = -1;
    }

    Rows query_rows(const performers_array &array, int64_t head, int64_t group) const {
        return rows_at(array, batch_of(head), key_head_of(head), group);
    }
    Rows key_rows(const performers_array &array, int64_t head) const {
        return rows_at(array, batch_of(head), key_head_of(head), 0);
    }
    int64_t row_index(int64_t head, int64_t group, int64_t position) const {
        return (head * call.groups + group) * call.length + position;
    }
    // The index of a span's sequence among those that have sinks.
    int64_t sequence_of(int64_t head, const Span &span) const {
        return call.segments ? call.segments[span.first] : batch_of(head);
    }
    const uint8_t *mask(int64_t head) const {
        return call.key_mask ? call.key_mask + batch_of(head) * call.size : nullptr;
    }
};

// A base of structures whose members take their memory from an arena as they are made.
struct Buffers {
    Arena &arena;  // only then
    const Problem &p;

    Buffers(Arena &arena, const Problem &p) : arena(arena), p(p) {}
};

// Up to kBlock rows of queries or keys. Rows past the end, and masked keys, are zero.
struct Block : Buffers {
    using Buffers::Buffers;

    float *x = arena.take(kBlock * p.padded_dim);  // (kBlock, padded_dim)
    // (weight_stride, kBlock): with rows for the bias and the norm
    float *transposed = arena.take(p.weight_stride * kBlock);
    int64_t rows = 0;

    void load_queries(const Problem &p, const Rows &from, int64_t begin, int64_t count) {
        load_rows(p, from, count, [&](int64_t r) { return begin + r; });
    }

    // Row index(r) of `from` as row r, or zeros where that is negative.
    template <typename Index>
    void load_rows(const Problem &p, const Rows &from, int64_t count, Index &&index) {
        rows = count;
        const int64_t used = round_up(rows, kWidth);
        for (int64_t r = 0; r < used; ++r) {
            const int64_t row = r < rows ? index(r) : -1;
            if (row < 0) {
                clear(p, r);
            } else {
                read(from, row, p.head_dim, p.padded_dim, x + r * p.padded_dim);
            }
        }
        p.check(x, used * p.padded_dim);
        transpose(x, p.padded_dim, rows, p.padded_dim, transposed);
        if (p.call.bias) fill(p.head_dim, used, 1.0f);
    }

    // `keep` (kBlock) becomes one for keys that take part, zero for others and for rows before
    // `first`.
    void load_keys(const Problem &p, const Rows &from, const uint8_t *mask, int64_t begin,
                   int64_t count, float *keep, int64_t first = 0) {
        rows = count;
        const int64_t used = round_up(rows, kWidth);
        for (int64_t r = 0; r < used; ++r) {
            const bool there = r < rows && begin + r >= first;
            keep[r] = there && (!mask || mask[begin + r]) ? 1.0f : 0.0f;
            if (keep[r] != 0) {
                read(from, begin + r, p.head_dim, p.padded_dim, x + r * p.padded_dim);
            } else {
                clear(p, r);
            }
        }
        p.check(x, used * p.padded_dim);
        transpose(x, p.padded_dim, rows, p.padded_dim, transposed);
        if (p.call.bias) fill(p.head_dim, used, 1.0f);
        if (p.exponential) norms(p, used, keep);
    }

    // For queries beside exact pairs: the binary logarithm of the factor that their features lack,
    // normalizer exp(-scale |q|^2 / 2).
    void offsets(const Problem &p, float *to) const {
        for (int64_t r = 0; r < rows; r += kWidth) {
            store(to + r, splat(p.log_normalizer) - squared_norm(p, r));
        }
    }

private:
    // |norm_root x|^2 of the rows from r on.
    Vector squared_norm(const Problem &p, int64_t r) const {
        Vector sum = splat(0.0f);
        for (int64_t c = 0; c < p.head_dim; ++c) {
            const Vector y = load(transposed + c * kBlock + r) * p.norm_root;
            sum += y * y;
        }
        return sum;
    }

    void clear(const Problem &p, int64_t r) const {
        for (int64_t c = 0; c < p.padded_dim; ++c) x[r * p.padded_dim + c] = 0;
    }

    void fill(int64_t row, int64_t used, float value) const {
        for (int64_t r = 0; r < used; ++r) transposed[row * kBlock + r] = value;
    }

    // An infinite norm gives a key features of zero: one that takes no part, and one so long that
    // its norm overflows, whose projections must not be infinite then.
    void norms(const Problem &p, int64_t used, const float *keep) const {
        float *to = transposed + p.query_inner * kBlock;
        for (int64_t r = 0; r < used; r += kWidth) {
            store(to + r, p.norm_root != 0 ? squared_norm(p, r) : splat(0.0f));
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
        float *row = to + r * p.padded_value;
        if (r < rows && (!keep || keep[r] != 0)) {
            read(from, begin + r, p.value_dim, p.padded_value, row);
        } else {
            for (int64_t c = 0; c < p.padded_value; ++c) row[c] = 0;
        }
    }
    p.check(to, round_up(rows, kWidth) * p.padded_value);
}

// A block of keys and their values, packed: masked ones, and rows before `first`, are zero.
inline void load_keys_and_values(const Problem &p, int64_t head, int64_t begin, int64_t rows,
                                 Block &block, float *keep, float *value, int64_t first = 0) {
    block.load_keys(p, p.key_rows(p.call.key, head), p.mask(head), begin, rows, keep, first);
    load_values(p, p.key_rows(p.call.value, head), begin, rows, keep, value);
}

// Rows [first, first + count) of W x + b, less the norm for keys: (count, kBlock).
inline void project(const Problem &p, const float *weights, const Block &block, int64_t inner,
                    int64_t first, int64_t count, float *to) {
    multiply(count, block.rows, inner, rows_of(weights + first * p.weight_stride, p.weight_stride),
             block.transposed, kBlock, to, kBlock, false);
}

// Whole vectors times a factor.
inline void scale_vectors(float *row, int64_t count, float factor) {
    for (int64_t c = 0; c < count; c += kWidth) store(row + c, load(row + c) * splat(factor));
}

// Sums over keys: key_value (features, padded_value), key_sum and log_scale (features), one block
// of memory.
struct Sums {
    float *key_value, *key_sum, *log_scale;

    Sums(float *memory, const Problem &p)
        : key_value(memory),
          key_sum(memory + p.features * p.padded_value),
          log_scale(key_sum + p.features) {}

    static int64_t size(const Problem &p) { return p.features * (p.padded_value + 2); }

    void clear(const Problem &p) const {
        for (int64_t i = 0; i < p.features * (p.padded_value + 1); ++i) key_value[i] = 0;
        for (int64_t f = 0; f < p.features; ++f) log_scale[f] = p.exponential ? -kInfinity : 0.0f;
    }

    void scale_row(const Problem &p, int64_t f, float factor) const {
        scale_vectors(key_value + f * p.padded_value, p.padded_value, factor);
    }

    void copy(const Problem &p, const Sums &from) const {
        std::memcpy(key_value, from.key_value, sizeof(float) * static_cast<size_t>(size(p)));
    }

    // Adds sums at the same scales.
    void add(const Problem &p, const Sums &other) const {
        for (int64_t i = 0; i < p.features * (p.padded_value + 1); ++i) {
            key_value[i] += other.key_value[i];
        }
    }

    // Adds the sums over other keys, at their scales.
    void merge(const Problem &p, const Sums &other) const {
        for (int64_t f = 0; f < p.features; ++f) {
            const float scale = larger(log_scale[f], other.log_scale[f]);
            const float mine = decay(log_scale[f], scale);
            const float theirs = decay(other.log_scale[f], scale);
            float *row = key_value + f * p.padded_value;
            const float *more = other.key_value + f * p.padded_value;
            for (int64_t c = 0; c < p.padded_value; ++c) row[c] = row[c] * mine + more[c] * theirs;
            key_sum[f] = key_sum[f] * mine + other.key_sum[f] * theirs;
            log_scale[f] = scale;
        }
    }
};

// Between packed sums and contiguous tensors of one head; `unit` is what one unit of the tensor's
// log scale is in binary logarithms. A null tensor is zero, or not written.
inline void import_sums(const Problem &p, const Sums &to, const float *key_value,
                        const float *key_sum, const float *log_scale, float unit) {
    to.clear(p);
    for (int64_t f = 0; f < p.features; ++f) {
        if (key_value) {
            std::memcpy(to.key_value + f * p.padded_value, key_value + f * p.value_dim,
                        sizeof(float) * static_cast<size_t>(p.value_dim));
        }
        if (key_sum) to.key_sum[f] = key_sum[f];
        if (log_scale) to.log_scale[f] = log_scale[f] * unit;
    }
}

inline void export_sums(const Problem &p, const Sums &from, float *key_value, float *key_sum,
                        float *log_scale, float unit) {
    for (int64_t f = 0; f < p.features; ++f) {
        if (key_value) {
            std::memcpy(key_value + f * p.value_dim, from.key_value + f * p.padded_value,
                        sizeof(float) * static_cast<size_t>(p.value_dim));
        }
        if (key_sum) key_sum[f] = from.key_sum[f];
        if (log_scale) log_scale[f] = from.log_scale[f] * unit;
    }
}

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
