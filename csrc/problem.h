// One call as the kernels see it.
//
// Exponents are binary: 2^x needs no constants to reduce its argument.
#pragma once

#include "blocks.h"

namespace performers::PERFORMERS_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kNatural = static_cast<float>(kLog2e), kLn2 = 0.69314718f;
constexpr float kInfinity = __builtin_inff();
// Where maxima of exponents begin: less than any, but not infinite, so that differences are numbers.
constexpr float kLowest = -3e38f;

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
    const bool exponential = call.kind == PERFORMERS_EXPONENTIAL;
    const int64_t window = smaller(call.window, call.length + call.size);  // of exact pairs, or < 0
    // Whether the keys that a causal query meets through features end before row i + shift, for query
    // i, or at i.
    const bool strict = window >= 0;
    const int64_t shift = strict ? call.offset - window : 0;
    // Whether features are summed beside exact pairs.
    const bool exact = strict || call.sinks > 0 || call.part != PERFORMERS_WHOLE;
    const int64_t heads = call.batch * call.key_heads;
    const int64_t features = call.features, head_dim = call.head_dim, value_dim = call.value_dim;
    // Rows of packed blocks, and of the weights.
    const int64_t padded_dim = round_up(head_dim, kWidth), padded_value = round_up(value_dim, kWidth);
    const int64_t weight_stride = round_up(head_dim + 2, kWidth);
    // Columns of the weights that meet queries, and keys.
    const int64_t query_inner = head_dim + (call.bias ? 1 : 0);
    const int64_t key_inner = query_inner + (exponential ? 1 : 0);
    // |norm_root x|^2 is what a key's exponents lose.
    const float norm_root = static_cast<float>(call.quadratic ? std::sqrt(call.scale * kLog2e / 2) : 0);
    const float epsilon = static_cast<float>(call.epsilon);
    const float log_normalizer = static_cast<float>(exact ? std::log2(call.normalizer) : 0);
    float *weights = nullptr;  // (weight_heads, features, weight_stride)
    // Whether NaN or infinity was among the rows that were read; set by any task.
    mutable bool nonfinite = false;

    explicit Problem(const performers_call &call) : call(call) {}

    // Looks at rows that were read.
    void check(const float *x, int64_t count) const {
        if (!all_finite(x, count)) __atomic_store_n(&nonfinite, true, __ATOMIC_RELAXED);
    }

    int64_t batch_of(int64_t head) const { return head / call.key_heads; }
    int64_t key_head_of(int64_t head) const { return head % call.key_heads; }

    // The first row of the weights, and of their gradients, that belongs to a head.
    int64_t weight_row(int64_t head) const {
        return call.weight_heads == 1 ? 0 : key_head_of(head) * features;
    }
    const float *weights_of(int64_t head) const { return weights + weight_row(head) * weight_stride; }
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

    // Keys and values have no groups.
    Rows rows(const performers_array &array, int64_t head, int64_t group = 0) const {
        return rows_at(array, batch_of(head), key_head_of(head), group);
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
    const int64_t *positions(int64_t head) const {
        return call.positions ? call.positions + batch_of(head) * call.size : nullptr;
    }
};

// A base of structures whose members take their memory from an arena as they are made.
struct Buffers {
    Arena &arena;  // only then
    const Problem &p;

    Buffers(Arena &arena, const Problem &p) : arena(arena), p(p) {}
};

}  // namespace
}  // namespace performers::PERFORMERS_ISA
