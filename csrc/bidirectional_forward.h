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
inline float absorb_feature(const Sums &sums, int64_t f, float *exponents, int64_t rows) {
    const Vector peak = peaks(exponents, rows, -kInfinity);
    if (any_greater(peak, splat(sums.log_scale[f]))) {
        const float before = sums.log_scale[f];
        sums.log_scale[f] = largest(peak);
        sums.scale_row(f, decay(before, sums.log_scale[f]));
    }
    return exponentiate(exponents, rows, sums.log_scale[f]);
}

struct KeyBuffers : KeyBlock {
    using KeyBlock::KeyBlock;

    float *panel = arena.take(kPanel * kBlock);
};

// Adds the keys [begin, end) of a head to the sums.
inline void absorb(const Problem &p, int64_t head, int64_t begin, int64_t end, const Sums &sums,
                   KeyBuffers &b) {
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t rows = smaller(kBlock, end - start);
        b.load_keys(head, start, rows);
        for (int64_t first = 0; first < p.features; first += kPanel) {
            const int64_t count = smaller(kPanel, p.features - first);
            project(p, head, b.block, first, count, b.panel);
            if (!p.exponential) rectify(p, b.panel, count, rows, b.keep);
            for (int64_t f = 0; f < count; ++f) {
                float *row = b.panel + f * kBlock;
                sums.key_sum[first + f] += p.exponential ? absorb_feature(sums, first + f, row, rows)
                                                         : sum_feature(row, rows);
            }
            sum_rows(p.padded_value, count, rows, b.panel, b.value, sums.row(first), true);
        }
    }
}

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

// What features give to a block of queries, from the sums over keys.
inline void read_sums(const Problem &p, int64_t head, const Sums &sums, QueryBuffers &b) {
    project(p, head, b.block, 0, p.features, b.features);
    query_features(p, b.features, b.block.rows, sums.log_scale, sums.key_sum, b.scale, b.normaliser);
    combine(p.padded_value, b.block.rows, p.features, b.features, sums.key_value, b.out, false);
}

// Divides rows by their normalisers, writes them out, and keeps what the backward pass needs.
inline void finish_rows(const Problem &p, int64_t head, int64_t group, int64_t begin, QueryBuffers &b) {
    const Rows to = p.rows(p.call.out, head, group);
    const int64_t index = p.row_index(head, group, begin);
    for (int64_t r = 0; r < b.block.rows; ++r) {
        float *row = b.out + r * p.padded_value;
        const float inverse = inverse_of(b.normaliser[r]);
        scale_vectors(row, p.padded_value, __builtin_fabsf(inverse));
        write(to, begin + r, p.value_dim, row);
        p.call.row_scale[index + r] = b.scale[r];
        p.call.row_inverse[index + r] = inverse;
    }
}

// The queries of a span in all groups of a head: against the sums, unless these are null, and exactly.
inline void read_out(const Problem &p, int64_t head, const Span &span, const Sums *sums,
                     QueryBuffers &b) {
    for (int64_t group = 0; group < p.call.groups; ++group) {
        const Rows queries = p.rows(p.call.query, head, group);
        for (int64_t start = span.begin; start < span.end; start += kBlock) {
            b.block.load_queries(queries, start, smaller(kBlock, span.end - start));
            if (sums) {
                read_sums(p, head, *sums, b);
            } else {
                b.clear();
            }
            if (p.exact) {
                exact_sums(p, head, span, start, b);
                add_exact(p, b);
            }
            finish_rows(p, head, group, start, b);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
