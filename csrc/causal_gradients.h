// The backward pass of causal attention, in two passes over the chunks. The first goes forward: it
// builds the running sums again and computes the gradients of queries. The second goes backward
// with the gradient of the sums, and computes those of keys and values. Features are computed in
// both; kept between them are only the log scales before each chunk.
#pragma once

#include "causal_forward.h"
#include "bidirectional_gradients.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct CausalGradientBuffers : Buffers {
    using Buffers::Buffers;

    ChunkKeys keys{arena, p};
    QueryGradientBlock q{arena, p};
    MendedRow mended{arena, p};
    float *features = arena.take(p.features * kBlock), *slope = arena.take(p.features * kBlock);
    float *query_exponents = arena.take(p.features * kBlock);
    float *pairs = arena.take(kBlock * kBlock);  // normalised, (kBlock keys, kBlock queries)
    float *pair_grads = arena.take(kBlock * kBlock);  // likewise
    float *pair_grads_rows = arena.take(kBlock * kBlock);  // its transpose
    float *value_transposed = arena.take(p.padded_value * kBlock);
    float *key_slope = arena.take(p.features * kBlock);
    float *mended_slope = arena.take(p.features * kBlock);
    float *slope_sum = arena.take(kBlock), *grad_x = arena.take(kBlock * p.padded_dim);
    float *grad_value = arena.take(kBlock * p.padded_value), *grad_key_sum = arena.take(p.features);
    Sums sums{arena.take(Sums::size(p)), p}, grad_sums{arena.take(Sums::size(p)), p};
    Sums mended_sums{arena.take(Sums::size(p)), p};
    WeightSums trained;
};

// Calls visit(r, 1 / normaliser) for the rows that were summed at a scale of their own, after
// b.mended has been computed for each. Returns whether there were any.
template <typename Visit>
inline bool for_mended_rows(const Problem &p, int64_t head, CausalGradientBuffers &b,
                           Visit &&visit) {
    bool any = false;
    for (int64_t r = 0; r < b.q.block.rows; ++r) {
        if (!(b.q.inverse[r] < 0)) continue;
        if (!any) {
            b.keys.load_exponents(p, p.weights_of(head));
            project(p, p.weights_of(head), b.q.block, p.query_inner, 0, p.features,
                    b.query_exponents);
            any = true;
        }
        b.mended.compute_at(p, b.query_exponents, r, b.keys, b.q.scale[r]);
        visit(r, -b.q.inverse[r]);
    }
    return any;
}

// The gradients of a mended row's pairs, times 1 / normaliser, in the place of the pairs.
inline const float *mended_shares(const Problem &p, int64_t r, float inverse,
                                 CausalGradientBuffers &b) {
    const int64_t seen = seen_keys(p, r);
    float *shares = b.mended.pairs;
    for (int64_t j = 0; j < round_up(seen, kWidth); ++j) {
        shares[j] = j < seen ? b.pair_grads[j * kBlock + r] * inverse : 0.0f;
    }
    return shares;
}

// Gradients of the exponents of a mended row, into column r of b.slope.
inline void mended_query_slopes(const Problem &p, int64_t r, float inverse, const Sums &sums,
                               CausalGradientBuffers &b) {
    const float *grad = b.q.grad + r * p.padded_value;
    const int64_t used = round_up(seen_keys(p, r), kWidth);
    const float *shares = mended_shares(p, r, inverse, b);
    for (int64_t f = 0; f < p.features; ++f) {
        const float *past = b.keys.past_row(p, sums, f);
        Vector along = splat(0.0f), within = splat(0.0f);
        for (int64_t c = 0; c < p.padded_value; c += kWidth) {
            along += load(past + c) * load(grad + c);
        }
        for (int64_t j = 0; j < used; j += kWidth) {
            within += b.mended.pair_feature(b.keys, f, j) * load(shares + j);
        }
        const float towards = total(along) - b.q.delta[r] * b.keys.past_sum[f];
        b.slope[f * kBlock + r] = b.mended.past[f] * inverse * towards + total(within);
    }
}

// Adds what a mended row contributes to the gradient of the past's sums, times factor(f).
template <typename Factor>
inline void add_mended_row(const Problem &p, int64_t r, float inverse, const Sums &grad_sums,
                          CausalGradientBuffers &b, Factor &&factor) {
    const float *grad = b.q.grad + r * p.padded_value;
    for (int64_t f = 0; f < p.features; ++f) {
        const float phi = b.mended.past[f] * inverse * factor(f);
        float *row = grad_sums.key_value + f * p.padded_value;
        for (int64_t c = 0; c < p.padded_value; c += kWidth) {
            store(row + c, load(row + c) + load(grad + c) * phi);
        }
        grad_sums.key_sum[f] -= phi * b.q.delta[r];
    }
}

// Adds what the other rows contribute, from their normalised features, which this rescales.
template <typename Factor>
inline void add_rows(const Problem &p, const Sums &grad_sums, CausalGradientBuffers &b,
                     Factor &&factor) {
    const int64_t rows = b.q.block.rows;
    for (int64_t f = 0; f < p.features; ++f) {
        const Vector by = splat(factor(f));
        Vector lost = splat(0.0f);
        for (int64_t r = 0; r < rows; r += kWidth) {
            float *at = b.features + f * kBlock + r;
            const Vector phi = load(at) * by;
            store(at, phi);
            lost += phi * load(b.q.delta + r);
        }
        grad_sums.key_sum[f] -= total(lost);
    }
    multiply(p.features, p.padded_value, rows, rows_of(b.features, kBlock), b.q.grad,
             p.padded_value, grad_sums.key_value, p.padded_value, true);
}

// The first pass over a span, from the sums before it (b.sums). The log scales before each
// chunk, and after the last, become rows of `scales`. With `gather`, b.grad_sums gains the gradient
// of the sums that entered, at their scales.
inline void causal_query_gradients(const Problem &p, int64_t head, const Span &span, float *scales,
                                   bool gather, CausalGradientBuffers &b) {
    const float *weights = p.weights_of(head);
    const size_t scale_bytes = sizeof(float) * static_cast<size_t>(p.features);
    const float *entering = scales;
    for (int64_t start = span.begin; start < span.end; start += kBlock) {
        const int64_t rows = smaller(kBlock, span.end - start);
        std::memcpy(scales, b.sums.log_scale, scale_bytes);
        scales += p.features;
        b.keys.fetch(p, head, span, start, rows);
        b.keys.advance(p, b.sums);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            b.q.fetch(p, head, group, start, rows);
            project(p, weights, b.q.block, p.query_inner, 0, p.features, b.features);
            pair_gradients(p, rows, rows, b.keys.value, b.q.grad_transposed, b.q.delta,
                           seen_pairs(p), b.pair_grads);
            multiply(p.features, rows, p.value_dim, rows_of(b.sums.key_value, p.padded_value),
                     b.q.grad_transposed, kBlock, b.slope, kBlock, false);
            multiply(p.features, rows, rows, rows_of(b.keys.features, kBlock), b.pair_grads, kBlock,
                     b.slope, kBlock, true, by_column(kUpTo));
            query_slopes(p, b.q, b.sums, 0, p.features, b.features, b.slope, nullptr);
            for_mended_rows(p, head, b, [&](int64_t r, float inverse) {
                if (gather) {
                    add_mended_row(p, r, inverse, b.grad_sums, b, [&](int64_t f) {
                        return decay(entering[f], b.keys.past_scale[f]);
                    });
                }
                mended_query_slopes(p, r, inverse, b.sums, b);
            });
            b.trained.add(p, head, 0, p.features, b.slope, b.q.block);
            multiply(rows, p.padded_dim, p.features, columns_of(b.slope, kBlock), weights,
                     p.weight_stride, b.grad_x, p.padded_dim, false);
            for (int64_t r = 0; r < kBlock; ++r) b.slope_sum[r] = 0;
            if (p.exact) add_up(b.slope, p.features, rows, b.slope_sum);
            finish_gradients(p, p.query_rows(p.call.grad_query, head, group), start, b.q.block,
                             b.grad_x, p.exact ? b.slope_sum : nullptr);
            if (gather) {
                add_rows(p, b.grad_sums, b, [&](int64_t f) {
                    return decay(entering[f], b.sums.log_scale[f]);
                });
            }
        }
        b.keys.add(p, b.sums);
    }
    std::memcpy(scales, b.sums.log_scale, scale_bytes);
}

// Normalised features of queries from their projections, in place, at the given scales.
inline void normalised_features(const Problem &p, const QueryGradientBlock &q,
                                const float *log_scale, float *features) {
    const Vector zero = splat(0.0f), epsilon = splat(p.epsilon);
    for (int64_t f = 0; f < p.features; ++f) {
        const Vector scale = splat(log_scale[f]);
        for (int64_t r = 0; r < q.block.rows; r += kWidth) {
            float *at = features + f * kBlock + r;
            const Vector inverse = maximum(zero, load(q.inverse + r)), x = load(at);
            store(at, p.exponential ? normalised_feature(x, scale, load(q.scale + r), inverse)
                                    : (maximum(zero, x) + epsilon) * inverse);
        }
    }
}

// The queries of one group in a chunk of the second pass: adds to the slopes of keys, to the
// gradients of values and to those of the sums. Returns whether there were mended rows.
inline bool add_chunk_queries(const Problem &p, int64_t head, int64_t group, int64_t start,
                              int64_t rows, const float *log_scale, CausalGradientBuffers &b) {
    b.q.fetch(p, head, group, start, rows);
    project(p, p.weights_of(head), b.q.block, p.query_inner, 0, p.features, b.features);
    normalised_features(p, b.q, log_scale, b.features);
    pair_gradients(p, rows, rows, b.keys.value, b.q.grad_transposed, b.q.delta, seen_pairs(p),
                   b.pair_grads);
    multiply_band(rows, rows, p.features, columns_of(b.keys.features, kBlock), b.features, kBlock,
                   b.pairs, kBlock, kUpTo);
    clear_outside(b.pairs, rows, rows, seen_pairs(p));
    const bool any = for_mended_rows(p, head, b, [&](int64_t r, float inverse) {
        add_mended_row(p, r, inverse, b.mended_sums, b, [](int64_t) { return 1.0f; });
        const int64_t seen = seen_keys(p, r), used = round_up(seen, kWidth);
        for (int64_t j = 0; j < seen; ++j) b.pairs[j * kBlock + r] = b.mended.pairs[j] * inverse;
        const float *shares = mended_shares(p, r, inverse, b);
        for (int64_t f = 0; f < p.features; ++f) {
            for (int64_t j = 0; j < used; j += kWidth) {
                const int64_t at = f * kBlock + j;
                const Vector more = b.mended.pair_feature(b.keys, f, j) * load(shares + j);
                store(b.mended_slope + at, load(b.mended_slope + at) + more);
            }
        }
    });
    transpose(b.pair_grads, kBlock, rows, round_up(rows, kWidth), b.pair_grads_rows);
    multiply(p.features, rows, rows, rows_of(b.features, kBlock), b.pair_grads_rows, kBlock,
             b.key_slope, kBlock, true, by_column(kFrom));
    multiply(rows, p.padded_value, rows, rows_of(b.pairs, kBlock), b.q.grad, p.padded_value,
             b.grad_value, p.padded_value, true, by_row(kFrom));
    add_rows(p, b.grad_sums, b, [](int64_t) { return 1.0f; });
    return any;
}

// b.key_slope becomes the gradients of the exponents of keys, b.slope_sum (kBlock) their sums.
inline void chunk_key_slopes(const Problem &p, bool mended, CausalGradientBuffers &b) {
    const Vector zero = splat(0.0f);
    for (int64_t r = 0; r < b.keys.block.rows; r += kWidth) {
        const Vector kept = load(b.keys.keep + r);
        Vector sum = zero;
        for (int64_t f = 0; f < p.features; ++f) {
            float *at = b.key_slope + f * kBlock + r;
            const Vector towards = load(at) + splat(b.grad_key_sum[f]);
            Vector grad;
            if (p.exponential) {
                grad = load(b.keys.features + f * kBlock + r) * towards;
            } else {
                grad = load(b.keys.exponents + f * kBlock + r) > zero ? towards * kept : zero;
            }
            if (mended) grad += load(b.mended_slope + f * kBlock + r);
            store(at, grad);
            sum += grad;
        }
        store(b.slope_sum + r, sum);
    }
}

// Brings the gradient of the sums after a chunk to that of the sums before it.
inline void pass_to_past(const Problem &p, const float *before, const float *after, bool mended,
                         CausalGradientBuffers &b) {
    for (int64_t f = 0; f < p.features; ++f) {
        const float factor = decay(before[f], after[f]);
        if (factor == 1) continue;
        b.grad_sums.scale_row(p, f, factor);
        b.grad_sums.key_sum[f] *= factor;
    }
    if (mended) b.grad_sums.add(p, b.mended_sums);
}

// The second pass over a span, with the log scales of the first. b.grad_sums is the gradient of the
// sums after the span and becomes that of the sums before it.
inline void causal_key_gradients(const Problem &p, int64_t head, const Span &span,
                                 const float *scales, CausalGradientBuffers &b) {
    const float *weights = p.weights_of(head);
    const size_t scale_bytes = sizeof(float) * static_cast<size_t>(p.features);
    const int64_t chunks = (span.end - span.begin + kBlock - 1) / kBlock;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t start = span.begin + chunk * kBlock;
        const int64_t rows = smaller(kBlock, span.end - start);
        const float *before = scales + chunk * p.features, *after = before + p.features;
        b.keys.fetch(p, head, span, start, rows);
        if (!p.exponential) {
            // Whether a feature has a slope is known from its projection only: epsilon may hide it.
            std::memcpy(b.keys.exponents, b.keys.features, kBlock * scale_bytes);
        }
        b.keys.compute_features(p, after);
        std::memcpy(b.keys.past_scale, before, scale_bytes);
        transpose(b.keys.value, p.padded_value, rows, p.padded_value, b.value_transposed);
        multiply(p.features, rows, p.value_dim, rows_of(b.grad_sums.key_value, p.padded_value),
                 b.value_transposed, kBlock, b.key_slope, kBlock, false);
        multiply(rows, p.padded_value, p.features, columns_of(b.keys.features, kBlock),
                 b.grad_sums.key_value, p.padded_value, b.grad_value, p.padded_value, false);
        std::memcpy(b.grad_key_sum, b.grad_sums.key_sum, scale_bytes);
        for (int64_t i = 0; i < p.features * kBlock; ++i) b.mended_slope[i] = 0;
        b.mended_sums.clear(p);
        bool mended = false;
        for (int64_t group = 0; group < p.call.groups; ++group) {
            mended |= add_chunk_queries(p, head, group, start, rows, after, b);
        }
        chunk_key_slopes(p, mended, b);
        b.trained.add(p, head, 0, p.features, b.key_slope, b.keys.block);
        multiply(rows, p.padded_dim, p.features, columns_of(b.key_slope, kBlock), weights,
                 p.weight_stride, b.grad_x, p.padded_dim, false);
        finish_key_gradients(p, head, start + p.shift, b.keys.block, b.grad_x, b.slope_sum,
                             b.grad_value, span.first);
        pass_to_past(p, before, after, mended, b);
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
