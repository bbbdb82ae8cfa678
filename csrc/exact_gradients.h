// Gradients of exact pairs. A row's scale and normaliser are those of all its pairs, so the share of
// the exact ones in every gradient stands by itself and is added to that of the features.
#pragma once

#include "bidirectional_gradients.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct ExactGradientBuffers : Buffers {
    using Buffers::Buffers;

    QueryGradientBlock q{arena, p};
    ExactKeys keys{arena, p};
    float *pairs = arena.take(kBlock * kBlock), *pair_grads = arena.take(kBlock * kBlock);
    float *grad_x = arena.take(kBlock * p.padded_dim);  // of the queries (kBlock, padded_dim)
    float *grad_key = arena.take(kBlock * p.padded_dim);
    float *grad_value = arena.take(kBlock * p.padded_value);
};

// Products become normalised weights, and gradients of weights (times scale) those of products.
inline void exact_pair_gradients(const Problem &p, int64_t rows, ExactGradientBuffers &b) {
    const Vector zero = splat(0.0f), unit = splat(score_unit(p));
    const Vector factor = splat(static_cast<float>(p.call.scale));
    for (int64_t t = 0; t < b.keys.count; ++t) {
        for (int64_t r = 0; r < rows; r += kWidth) {
            float *pair = b.pairs + t * kBlock + r, *grad = b.pair_grads + t * kBlock + r;
            Vector weight = zero, slope = zero;
            if (b.keys.some(t, r)) {
                const Vector score =
                    b.keys.where_met(t, r, load(pair) * unit, splat(-kInfinity));
                const Vector inverse = load(b.q.inverse + r);
                weight = exp2(score - load(b.q.whole_scale + r)) *
                         (inverse < zero ? -inverse : inverse);
                const Vector towards = (load(grad) - load(b.q.delta + r)) * factor;
                slope = b.keys.where_met(t, r, weight * towards, zero);
            }
            store(pair, weight);
            store(grad, slope);
        }
    }
}

inline void add_rows(const float *from, int64_t stride, int64_t rows, int64_t width, float *to,
                     int64_t to_stride) {
    for (int64_t r = 0; r < rows; ++r) {
        const float *row = from + r * stride;
        float *at = to + r * to_stride;
        for (int64_t c = 0; c < width; ++c) at[c] += row[c];
    }
}

// Adds the share of the exact pairs to the gradients of the queries of a span, of the keys and values
// they meet, and of sinks: (sinks, head_dim) and (sinks, value_dim) of their sequence and head.
inline void exact_gradients(const Problem &p, int64_t head, const Span &span, float *sink_key,
                            float *sink_value, ExactGradientBuffers &b) {
    const Rows grad_keys = p.key_rows(p.call.grad_key, head);
    const Rows grad_values = p.key_rows(p.call.grad_value, head);
    for (int64_t group = 0; group < p.call.groups; ++group) {
        const Rows to = p.query_rows(p.call.grad_query, head, group);
        for (int64_t start = span.begin; start < span.end; start += kBlock) {
            const int64_t rows = smaller(kBlock, span.end - start);
            b.q.fetch(p, head, group, start, rows);
            bool any = false;
            for_exact_keys(p, head, span, start, rows, b.keys, [&]() {
                const int64_t count = b.keys.count;
                const Part by_query = by_row(b.keys.band), by_key = by_row(b.keys.band.reversed());
                exact_products(p, b.keys, b.q.block, b.pairs);
                multiply_band(count, rows, p.value_dim, rows_of(b.keys.value, p.padded_value),
                              b.q.grad_transposed, kBlock, b.pair_grads, kBlock, b.keys.band);
                exact_pair_gradients(p, rows, b);
                multiply(count, p.padded_value, rows, rows_of(b.pairs, kBlock), b.q.grad,
                         p.padded_value, b.grad_value, p.padded_value, false, by_key);
                multiply(count, p.padded_dim, rows, rows_of(b.pair_grads, kBlock), b.q.block.x,
                         p.padded_dim, b.grad_key, p.padded_dim, false, by_key);
                multiply(rows, p.padded_dim, count, columns_of(b.pair_grads, kBlock), b.keys.x,
                         p.padded_dim, b.grad_x, p.padded_dim, any, by_query);
                any = true;
                const int64_t row = b.keys.row;
                float *key = b.keys.sinks ? sink_key + row * p.head_dim : float_row(grad_keys, row);
                float *value =
                    b.keys.sinks ? sink_value + row * p.value_dim : float_row(grad_values, row);
                add_rows(b.grad_key, p.padded_dim, count, p.head_dim, key,
                         b.keys.sinks ? p.head_dim : grad_keys.row_stride);
                add_rows(b.grad_value, p.padded_value, count, p.value_dim, value,
                         b.keys.sinks ? p.value_dim : grad_values.row_stride);
            });
            if (!any) continue;
            add_rows(b.grad_x, p.padded_dim, rows, p.head_dim, float_row(to, start), to.row_stride);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
