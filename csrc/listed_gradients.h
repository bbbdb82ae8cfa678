// Gradients of listed keys: the features of a list once more, then blocks of queries, whose shares of
// the keys' gradients are added up before they are written.
#pragma once

#include "listed_forward.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct ListedGradientBuffers : Buffers {
    using Buffers::Buffers;

    ListedBuffers list{arena, p};
    // of keys (chunks, features, kBlock)
    float *slopes = arena.take(round_up(p.call.size, kBlock) * p.features);
    // (chunks, kBlock, padded)
    float *grad_keys = arena.take(round_up(p.call.size, kBlock) * p.padded_dim);
    float *grad_values = arena.take(round_up(p.call.size, kBlock) * p.padded_value);
    // of the rows' outputs
    float *grad = arena.take(kBlock * p.padded_value);
    float *grad_transposed = arena.take(p.padded_value * kBlock);
    float *delta = arena.take(kBlock), *factor = arena.take(kBlock);  // (kBlock)
    float *pair_grads = arena.take(kBlock * kBlock), *pair_grads_rows = arena.take(kBlock * kBlock);
    // of queries (features, kBlock); (kBlock)
    float *slope = arena.take(p.features * kBlock), *slope_sum = arena.take(kBlock);
    float *grad_x = arena.take(kBlock * p.padded_dim);
    float *grad_query = arena.take(kBlock * p.padded_dim);
    WeightSums trained;
};

// The output gradients of a block's rows, and delta = grad . out less the gradient of the logarithm
// of the normaliser; `factor` is what divides weights at the scales `b.list.scale`, or at one if
// there are none: 2^(scale - log2 normaliser).
inline void load_listed_grads(const Problem &p, const performers_listed_call &call,
                              const ListPlace &place, int64_t block, const float *out,
                              const double *log_normaliser, const float *grad_out,
                              const float *grad_log, const float *scale,
                              ListedGradientBuffers &b) {
    const Rows grads = plain_rows(grad_out, p.value_dim);
    for (int64_t r = 0; r < round_up(call.rows, kWidth); ++r) {
        float *grad = b.grad + r * p.padded_value;
        const int64_t query = r < call.rows ? place.query(call, block, r) : -1;
        b.delta[r] = 0;
        b.factor[r] = -kInfinity;
        if (query < 0) {
            for (int64_t c = 0; c < p.padded_value; ++c) grad[c] = 0;
            continue;
        }
        read(grads, query, p.value_dim, p.padded_value, grad);
        const float *row = out + query * p.value_dim;
        for (int64_t c = 0; c < p.value_dim; ++c) b.delta[r] += row[c] * grad[c];
        b.delta[r] -= grad_log[query];
        const double log2_sum = log_normaliser[query] / std::log(2.0);
        if (log2_sum > -kInfinity) {
            b.factor[r] = static_cast<float>((scale ? scale[r] : 0.0f) - log2_sum);
        }
    }
    transpose(b.grad, p.padded_value, call.rows, p.padded_value, b.grad_transposed);
}

// Gradients of the estimates of a block's pairs.
inline void estimate_gradients(const Problem &p, const performers_listed_call &call,
                               const ListPlace &place, int64_t block, ListedGradientBuffers &b) {
    ListedBuffers &l = b.list;
    load_listed_grads(p, call, place, block, call.estimate, call.estimate_log, call.grad_estimate,
                      call.grad_estimate_log, l.scale, b);
    for (int64_t f = 0; f < p.features; ++f) {
        for (int64_t r = 0; r < call.rows; r += kWidth) {
            float *at = l.features + f * kBlock + r;
            store(at, load(at) * exp2(load(b.factor + r)));
        }
    }
    estimated_pairs(p, call, l);
    for (size_t i = 0; i < l.chunks.size(); ++i) {
        const ListChunk &chunk = l.chunks[i];
        const int64_t at = static_cast<int64_t>(i) * kBlock, keys = chunk.block.rows;
        pair_gradients(p, keys, call.rows, chunk.value, b.grad_transposed, b.delta, kAll,
                       b.pair_grads);
        clear_unmet(call, l.met + at * kBlock, keys, 0.0f, b.pair_grads);
        for (int64_t t = keys; t < round_up(keys, kWidth); ++t) {
            for (int64_t r = 0; r < kBlock; ++r) b.pair_grads[t * kBlock + r] = 0;
        }
        multiply(keys, p.padded_value, call.rows, rows_of(l.pairs + at * kBlock, kBlock), b.grad,
                 p.padded_value, b.grad_values + at * p.padded_value, p.padded_value, true);
        multiply(p.features, call.rows, keys, rows_of(chunk.features, kBlock), b.pair_grads, kBlock,
                 b.slope, kBlock, i > 0);
        transpose(b.pair_grads, kBlock, keys, round_up(call.rows, kWidth), b.pair_grads_rows);
        multiply(p.features, keys, call.rows, rows_of(l.features, kBlock), b.pair_grads_rows,
                 kBlock, b.slopes + at * p.features, kBlock, true);
    }
    for (int64_t f = 0; f < p.features; ++f) {
        for (int64_t r = 0; r < call.rows; r += kWidth) {
            float *at = b.slope + f * kBlock + r;
            store(at, load(at) * load(l.features + f * kBlock + r));
        }
    }
    b.trained.add(p, place.head, 0, p.features, b.slope, l.queries);
    multiply(call.rows, p.padded_dim, p.features, columns_of(b.slope, kBlock),
             p.weights_of(place.head), p.weight_stride, b.grad_x, p.padded_dim, false);
}

// Gradients of the exact weights of a block's pairs; those of the queries go to b.grad_query.
inline void listed_exact_gradients(const Problem &p, const performers_listed_call &call,
                                   const ListPlace &place, int64_t block,
                                   ListedGradientBuffers &b) {
    ListedBuffers &l = b.list;
    load_listed_grads(p, call, place, block, call.exact, call.exact_log, call.grad_exact,
                      call.grad_exact_log, nullptr, b);
    exact_scores(p, call, l);
    const Vector scale = splat(static_cast<float>(call.scale));
    for (size_t i = 0; i < l.chunks.size(); ++i) {
        const ListChunk &chunk = l.chunks[i];
        const int64_t at = static_cast<int64_t>(i) * kBlock, keys = chunk.block.rows;
        pair_gradients(p, keys, call.rows, chunk.value, b.grad_transposed, b.delta, kAll,
                       b.pair_grads);
        for (int64_t t = 0; t < keys; ++t) {
            for (int64_t r = 0; r < call.rows; r += kWidth) {
                float *pair = l.pairs + (at + t) * kBlock + r, *grad = b.pair_grads + t * kBlock + r;
                const Vector weight = exp2(load(pair) + load(b.factor + r));
                store(pair, weight);
                store(grad, load(grad) * weight * scale);
            }
        }
        multiply(keys, p.padded_value, call.rows, rows_of(l.pairs + at * kBlock, kBlock), b.grad,
                 p.padded_value, b.grad_values + at * p.padded_value, p.padded_value, true);
        multiply(keys, p.padded_dim, call.rows, rows_of(b.pair_grads, kBlock), l.queries.x,
                 p.padded_dim, b.grad_keys + at * p.padded_dim, p.padded_dim, true);
        multiply(call.rows, p.padded_dim, keys, columns_of(b.pair_grads, kBlock), chunk.block.x,
                 p.padded_dim, b.grad_query, p.padded_dim, i > 0);
    }
}

inline void backward_list(const Problem &p, const performers_listed_call &call,
                          const ListPlace &place, ListedGradientBuffers &b) {
    if (place.first == place.last) return;
    ListedBuffers &l = b.list;
    load_list(p, call, place, l);
    const int64_t padded = round_up(call.list_keys, kBlock);
    for (int64_t i = 0; i < padded * p.features; ++i) b.slopes[i] = 0;
    for (int64_t i = 0; i < padded * p.padded_dim; ++i) b.grad_keys[i] = 0;
    for (int64_t i = 0; i < padded * p.padded_value; ++i) b.grad_values[i] = 0;
    for (int64_t block = place.first; block < place.last; ++block) {
        load_listed_queries(p, call, place, block, l);
        estimate_gradients(p, call, place, block, b);
        listed_exact_gradients(p, call, place, block, b);
        for (int64_t r = 0; r < call.rows; ++r) {
            const int64_t query = place.query(call, block, r);
            if (query < 0) continue;
            float *to = call.grad_query + query * p.head_dim;
            for (int64_t c = 0; c < p.head_dim; ++c) {
                to[c] = b.grad_x[r * p.padded_dim + c] * projection_unit(p) +
                        b.grad_query[r * p.padded_dim + c];
            }
        }
    }
    for (size_t i = 0; i < l.chunks.size(); ++i) {
        const ListChunk &chunk = l.chunks[i];
        const int64_t start = static_cast<int64_t>(i) * kBlock, keys = chunk.block.rows;
        float *slope = b.slopes + start * p.features;
        for (int64_t r = 0; r < kBlock; ++r) b.slope_sum[r] = 0;
        for (int64_t f = 0; f < p.features; ++f) {
            for (int64_t r = 0; r < keys; r += kWidth) {
                float *at = slope + f * kBlock + r;
                store(at, load(at) * load(chunk.features + f * kBlock + r));
            }
        }
        add_up(slope, p.features, keys, b.slope_sum);
        b.trained.add(p, place.head, 0, p.features, slope, chunk.block);
        multiply(keys, p.padded_dim, p.features, columns_of(slope, kBlock),
                 p.weights_of(place.head), p.weight_stride, b.grad_x, p.padded_dim, false);
        const int64_t first = place.keys(call) + start;
        for (int64_t t = 0; t < keys; ++t) {
            const float along = b.slope_sum[t] * static_cast<float>(call.scale);
            float *key = call.grad_key + (first + t) * p.head_dim;
            for (int64_t c = 0; c < p.head_dim; ++c) {
                key[c] = b.grad_x[t * p.padded_dim + c] * projection_unit(p) -
                         chunk.block.x[t * p.padded_dim + c] * along +
                         b.grad_keys[(start + t) * p.padded_dim + c];
            }
            float *value = call.grad_value + (first + t) * p.value_dim;
            const float *from = b.grad_values + (start + t) * p.padded_value;
            for (int64_t c = 0; c < p.value_dim; ++c) value[c] = from[c];
        }
    }
}

inline void backward_listed(const performers_listed_call &call) {
    const performers_call sizes = call_of(call);
    Problem p(sizes);
    const Weights weights(p);
    const WeightGradients trained(p);
    trained.parallel_tasks(p.heads * call.lists, [&](int64_t i, const WeightSums &sums) {
        auto b = in_scratch<ListedGradientBuffers>(p);
        b.trained = sums;
        backward_list(p, call, ListPlace(call, i), b);
    });
    trained.finish();
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
