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
    PairGradients pairs{arena, p};
    float *key_slope = arena.take(p.features * kBlock);
    float *mended_slope = arena.take(p.features * kBlock);
    float *grad_value = arena.take(kBlock * p.padded_value), *grad_key_sum = arena.take(p.features);
    InputGradients inputs{arena, p};
    Sums sums{arena, p}, grad_sums{arena, p}, mended_sums{arena, p};
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
            b.keys.load_exponents(head);
            project(p, head, b.q.block, 0, p.features, b.query_exponents);
            any = true;
        }
        b.mended.compute_at(b.query_exponents, r, b.keys, b.q.scale[r]);
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
        shares[j] = j < seen ? b.pairs.grads[j * kBlock + r] * inverse : 0.0f;
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
        const float *past = b.keys.past_row(sums, f);
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
        float *row = grad_sums.row(f);
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
    sum_rows(p.padded_value, p.features, rows, b.features, b.q.grad, grad_sums.key_value, true);
}

// The first pass over a span, from the sums before it (b.sums). The log scales before each
// chunk, and after the last, become rows of `scales`. With `gather`, b.grad_sums gains the gradient
// of the sums that entered, at their scales.
inline void causal_query_gradients(const Problem &p, int64_t head, const Span &span, float *scales,
                                   bool gather, CausalGradientBuffers &b) {
    const size_t scale_bytes = sizeof(float) * static_cast<size_t>(p.features);
    const float *entering = scales;
    const Band band = seen_pairs(p);
    for (int64_t start = span.begin; start < span.end; start += kBlock) {
        const int64_t rows = smaller(kBlock, span.end - start);
        std::memcpy(scales, b.sums.log_scale, scale_bytes);
        scales += p.features;
        b.keys.fetch(head, span, start, rows);
        b.keys.advance(b.sums);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            b.q.fetch(head, group, start, rows);
            project(p, head, b.q.block, 0, p.features, b.features);
            b.pairs.load_grads(rows, b.keys.value, b.q, band);
            value_products(p, p.features, rows, b.sums.key_value, b.q.grad_transposed, b.slope);
            b.pairs.add_to_queries(rows, b.q, b.keys.features, band, b.slope);
            query_slopes(p, b.q, b.sums, 0, p.features, b.features, b.slope, nullptr);
            for_mended_rows(p, head, b, [&](int64_t r, float inverse) {
                if (gather) {
                    add_mended_row(p, r, inverse, b.grad_sums, b, [&](int64_t f) {
                        return decay(entering[f], b.keys.past_scale[f]);
                    });
                }
                mended_query_slopes(p, r, inverse, b.sums, b);
            });
            b.inputs.add(head, b.q.block, 0, p.features, b.slope, p.exact);
            b.inputs.finish(b.q.block, p.rows(p.call.grad_query, head, group), start);
            if (gather) {
                add_rows(p, b.grad_sums, b, [&](int64_t f) {
                    return decay(entering[f], b.sums.log_scale[f]);
                });
            }
        }
        b.keys.add(b.sums);
    }
    std::memcpy(scales, b.sums.log_scale, scale_bytes);
}

// The queries of one group in a chunk of the second pass: adds to the slopes of keys, to the
// gradients of values and to those of the sums. Returns whether there were mended rows.
inline bool add_chunk_queries(const Problem &p, int64_t head, int64_t group, int64_t start,
                              int64_t rows, const float *log_scale, CausalGradientBuffers &b) {
    const Band band = seen_pairs(p);
    b.q.fetch(head, group, start, rows);
    project(p, head, b.q.block, 0, p.features, b.features);
    for (int64_t f = 0; f < p.features; ++f) {
        const Vector scale = splat(log_scale[f]);
        for (int64_t r = 0; r < rows; r += kWidth) {
            float *at = b.features + f * kBlock + r;
            store(at, b.q.normalised_feature(load(at), scale, r));
        }
    }
    b.pairs.load_grads(rows, b.keys.value, b.q, band);
    feature_pairs(p, rows, rows, b.keys.features, b.features, band, b.pairs.weights);
    const bool any = for_mended_rows(p, head, b, [&](int64_t r, float inverse) {
        add_mended_row(p, r, inverse, b.mended_sums, b, [](int64_t) { return 1.0f; });
        const int64_t seen = seen_keys(p, r), used = round_up(seen, kWidth);
        for (int64_t j = 0; j < seen; ++j) {
            b.pairs.weights[j * kBlock + r] = b.mended.pairs[j] * inverse;
        }
        const float *shares = mended_shares(p, r, inverse, b);
        for (int64_t f = 0; f < p.features; ++f) {
            for (int64_t j = 0; j < used; j += kWidth) {
                const int64_t at = f * kBlock + j;
                const Vector more = b.mended.pair_feature(b.keys, f, j) * load(shares + j);
                store(b.mended_slope + at, load(b.mended_slope + at) + more);
            }
        }
    });
    b.pairs.add_to_keys(rows, b.q, b.features, band, b.key_slope, b.grad_value);
    add_rows(p, b.grad_sums, b, [](int64_t) { return 1.0f; });
    return any;
}

// b.key_slope becomes the gradients of the exponents of keys, or of their projections.
inline void chunk_key_slopes(const Problem &p, bool mended, CausalGradientBuffers &b) {
    if (p.exponential) {
        known_key_slopes(p, b.keys.block.rows, b.keys.features, b.grad_key_sum, b.key_slope);
        for (int64_t i = 0; mended && i < p.features * kBlock; ++i) b.key_slope[i] += b.mended_slope[i];
        return;
    }
    const Vector zero = splat(0.0f);
    for (int64_t f = 0; f < p.features; ++f) {
        for (int64_t r = 0; r < b.keys.block.rows; r += kWidth) {
            float *at = b.key_slope + f * kBlock + r;
            const Vector grad = (load(at) + splat(b.grad_key_sum[f])) * load(b.keys.keep + r);
            store(at, load(b.keys.exponents + f * kBlock + r) > zero ? grad : zero);
        }
    }
}

// Brings the gradient of the sums after a chunk to that of the sums before it.
inline void pass_to_past(const Problem &p, const float *before, const float *after, bool mended,
                         CausalGradientBuffers &b) {
    for (int64_t f = 0; f < p.features; ++f) {
        const float factor = decay(before[f], after[f]);
        if (factor != 1) b.grad_sums.scale_row(f, factor);
    }
    if (mended) b.grad_sums.add(b.mended_sums);
}

// The second pass over a span, with the log scales of the first. b.grad_sums is the gradient of the
// sums after the span and becomes that of the sums before it.
inline void causal_key_gradients(const Problem &p, int64_t head, const Span &span,
                                 const float *scales, CausalGradientBuffers &b) {
    const size_t scale_bytes = sizeof(float) * static_cast<size_t>(p.features);
    const int64_t chunks = (span.end - span.begin + kBlock - 1) / kBlock;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t start = span.begin + chunk * kBlock;
        const int64_t rows = smaller(kBlock, span.end - start);
        const float *before = scales + chunk * p.features, *after = before + p.features;
        b.keys.fetch(head, span, start, rows);
        if (!p.exponential) {
            // Whether a feature has a slope is known from its projection only: epsilon may hide it.
            std::memcpy(b.keys.exponents, b.keys.features, kBlock * scale_bytes);
        }
        b.keys.compute_features(after);
        std::memcpy(b.keys.past_scale, before, scale_bytes);
        b.keys.transpose_values();
        value_products(p, p.features, rows, b.grad_sums.key_value, b.keys.value_transposed,
                       b.key_slope);
        combine(p.padded_value, rows, p.features, b.keys.features, b.grad_sums.key_value,
                b.grad_value, false);
        std::memcpy(b.grad_key_sum, b.grad_sums.key_sum, scale_bytes);
        for (int64_t i = 0; i < p.features * kBlock; ++i) b.mended_slope[i] = 0;
        b.mended_sums.clear();
        bool mended = false;
        for (int64_t group = 0; group < p.call.groups; ++group) {
            mended |= add_chunk_queries(p, head, group, start, rows, after, b);
        }
        chunk_key_slopes(p, mended, b);
        b.inputs.add(head, b.keys.block, 0, p.features, b.key_slope, p.exponential);
        b.inputs.finish_keys(head, b.keys.block, start + p.shift, b.grad_value, span.first);
        pass_to_past(p, before, after, mended, b);
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
