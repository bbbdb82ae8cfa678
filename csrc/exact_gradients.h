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

// Adds rows of float32 to those of a tensor.
inline void add_rows(const float *from, int64_t stride, int64_t rows, int64_t width, const Rows &to) {
    for (int64_t r = 0; r < rows; ++r) {
        float *at = float_row(to, r);
        for (int64_t c = 0; c < width; ++c) at[c] += from[r * stride + c];
    }
}

// Adds the share of the exact pairs to the gradients of the queries of a span, of the keys and values
// they meet, and of sinks: (sinks, head_dim) and (sinks, value_dim) of their sequence and head.
inline void exact_gradients(const Problem &p, int64_t head, const Span &span, float *sink_key,
                            float *sink_value, ExactGradientBuffers &b) {
    for (int64_t group = 0; group < p.call.groups; ++group) {
        const Rows to = p.rows(p.call.grad_query, head, group);
        for (int64_t start = span.begin; start < span.end; start += kBlock) {
            const int64_t rows = smaller(kBlock, span.end - start);
            b.q.fetch(head, group, start, rows);
            bool any = false;
            for_exact_keys(p, head, span, start, rows, b.keys, [&]() {
                const int64_t count = b.keys.count;
                const Part by_query = by_row(b.keys.band), by_key = by_row(b.keys.band.reversed());
                exact_products(p, b.keys, b.q.block, b.pairs);
                multiply_band(count, rows, p.value_dim, rows_of(b.keys.value, p.padded_value),
                              b.q.grad_transposed, kBlock, b.pair_grads, kBlock, b.keys.band);
                exact_pair_gradients(p, rows, b);
                sum_rows(p.padded_value, count, rows, b.pairs, b.q.grad, b.grad_value, false, by_key);
                sum_rows(p.padded_dim, count, rows, b.pair_grads, b.q.block.x, b.grad_key, false,
                         by_key);
                combine(p.padded_dim, rows, count, b.pair_grads, b.keys.x, b.grad_x, any, by_query);
                any = true;
                const auto rows_to = [&](float *sinks, const performers_array &keys, int64_t width) {
                    if (!b.keys.sinks) return p.rows(keys, head).from(b.keys.row);
                    sinks += b.keys.row * width;
                    return Rows{reinterpret_cast<char *>(sinks), width, 1, PERFORMERS_FLOAT32};
                };
                add_rows(b.grad_key, p.padded_dim, count, p.head_dim,
                         rows_to(sink_key, p.call.grad_key, p.head_dim));
                add_rows(b.grad_value, p.padded_value, count, p.value_dim,
                         rows_to(sink_value, p.call.grad_value, p.value_dim));
            });
            if (any) add_rows(b.grad_x, p.padded_dim, rows, p.head_dim, to.from(start));
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
