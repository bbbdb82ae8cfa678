// Attention to all keys. Keys are summed block by block into the sums of Problem; queries read them
// block by block. The features of a block live in scratch memory only.
//
// Feature f of all keys is divided by 2^s_f, s_f its largest exponent so far; the features of a
// query are multiplied by the same and divided by their largest. Hence the largest term of a
// normaliser is at least one.
#pragma once

#include "exact_forward.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Turns the exponents of one feature over a block of keys into features, raising the scale of the
// sums when one of them exceeds it. Returns their sum.
inline float absorb_feature(const Problem &p, const Sums &sums, int64_t f, float *exponents,
                            int64_t rows) {
    const Vector peak = peaks(exponents, rows, -kInfinity);
    if (any_greater(peak, splat(sums.log_scale[f]))) {
        const float before = sums.log_scale[f], after = largest(peak);
        const float factor = decay(before, after);
        sums.scale_row(p, f, factor);
        sums.key_sum[f] *= factor;
        sums.log_scale[f] = after;
    }
    return exponentiate(exponents, rows, sums.log_scale[f]);
}

struct KeyBuffers : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    float *value = arena.take(kBlock * p.padded_value), *keep = arena.take(kBlock);
    float *panel = arena.take(kPanel * kBlock);
};

// Adds the keys [begin, end) of a head to the sums.
inline void absorb(const Problem &p, int64_t head, int64_t begin, int64_t end, const Sums &sums,
                   KeyBuffers &b) {
    const float *weights = p.weights_of(head);
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t rows = smaller(kBlock, end - start);
        load_keys_and_values(p, head, start, rows, b.block, b.keep, b.value);
        for (int64_t first = 0; first < p.features; first += kPanel) {
            const int64_t count = smaller(kPanel, p.features - first);
            project(p, weights, b.block, p.key_inner, first, count, b.panel);
            if (!p.exponential) rectify(p, b.panel, count, rows, b.keep);
            for (int64_t f = 0; f < count; ++f) {
                float *row = b.panel + f * kBlock;
                sums.key_sum[first + f] += p.exponential
                                               ? absorb_feature(p, sums, first + f, row, rows)
                                               : sum_feature(row, rows);
            }
            multiply(count, p.padded_value, rows, rows_of(b.panel, kBlock), b.value, p.padded_value,
                     sums.key_value + first * p.padded_value, p.padded_value, true);
        }
    }
}

struct QueryBuffers : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    ExactBuffers exact{arena, p};
    float *features = arena.take(p.features * kBlock), *out = arena.take(kBlock * p.padded_value);
    float *scale = arena.take(kBlock), *inverse = arena.take(kBlock);
};

// Exponents of queries become features at the scale of the sums, divided by the largest of each
// row: `scale` (kBlock) is the binary logarithm of that divisor, `normaliser` the sum over features
// of the feature times `weight` (features).
inline void query_features(const Problem &p, float *features, int64_t rows, const float *log_scale,
                           const float *weight, float *scale, float *normaliser) {
    if (!p.exponential) rectify(p, features, p.features, rows, nullptr);
    for (int64_t r = 0; r < rows; r += kWidth) {
        Vector peak = splat(p.exponential ? kLowest : 0.0f), sum = splat(0.0f);
        if (p.exponential) {
            for (int64_t f = 0; f < p.features; ++f) {
                peak = maximum(peak, load(features + f * kBlock + r) + splat(log_scale[f]));
            }
        }
        for (int64_t f = 0; f < p.features; ++f) {
            float *at = features + f * kBlock + r;
            Vector phi = load(at);
            if (p.exponential) {
                phi = exp2(phi + splat(log_scale[f]) - peak);
                store(at, phi);
            }
            sum += phi * splat(weight[f]);
        }
        store(scale + r, peak);
        store(normaliser + r, sum);
    }
}

// Divides rows by their normalisers, writes them out, and keeps what the backward pass needs.
inline void finish_rows(const Problem &p, int64_t head, int64_t group, int64_t begin, int64_t rows,
                        float *out, const float *scale, const float *inverse) {
    const Rows to = p.query_rows(p.call.out, head, group);
    const int64_t index = p.row_index(head, group, begin);
    for (int64_t r = 0; r < rows; ++r) {
        float *row = out + r * p.padded_value;
        scale_vectors(row, p.padded_value, __builtin_fabsf(inverse[r]));
        write(to, begin + r, p.value_dim, row);
        p.call.row_scale[index + r] = scale[r];
        p.call.row_inverse[index + r] = inverse[r];
    }
}

// The queries of a span in all groups of a head against the sums.
inline void read_out(const Problem &p, int64_t head, const Span &span, const Sums &sums,
                     QueryBuffers &b) {
    for (int64_t group = 0; group < p.call.groups; ++group) {
        const Rows queries = p.query_rows(p.call.query, head, group);
        for (int64_t start = span.begin; start < span.end; start += kBlock) {
            const int64_t rows = smaller(kBlock, span.end - start);
            b.block.load_queries(p, queries, start, rows);
            project(p, p.weights_of(head), b.block, p.query_inner, 0, p.features, b.features);
            query_features(p, b.features, rows, sums.log_scale, sums.key_sum, b.scale, b.inverse);
            multiply(rows, p.padded_value, p.features, columns_of(b.features, kBlock),
                     sums.key_value, p.padded_value, b.out, p.padded_value, false);
            if (p.exact) {
                exact_sums(p, head, span, start, b.block, b.exact);
                add_exact(p, rows, b.exact, b.out, b.scale, b.inverse);
            }
            for (int64_t r = 0; r < rows; ++r) b.inverse[r] = inverse_of(b.inverse[r]);
            finish_rows(p, head, group, start, rows, b.out, b.scale, b.inverse);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
