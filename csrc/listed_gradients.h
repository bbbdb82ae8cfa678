// Gradients of listed keys: the features of a list once more, then blocks of queries, whose shares of
// the keys' gradients are added up before they are written.
#pragma once

#include "listed_forward.h"

namespace performers::PERFORMERS_ISA {
namespace {

// What the keys of a chunk receive: slopes (features, kBlock), and the gradients of keys through exact
// weights, and of values.
struct ChunkGradients : Buffers {
    using Buffers::Buffers;

    float *slope = arena.take(p.features * kBlock), *key = arena.take(kBlock * p.padded_dim);
    float *value = arena.take(kBlock * p.padded_value);
};

struct ListedGradientBuffers : Buffers {
    ListedBuffers list{arena, p};
    QueryGradientBlock q{arena, p};  // without the queries
    float *factor = arena.take(kBlock);
    PairGradients pairs{arena, p};
    float *slope = arena.take(p.features * kBlock);           // of queries
    float *grad_query = arena.take(kBlock * p.padded_dim);  // through exact weights
    InputGradients inputs{arena, p};
    std::vector<ChunkGradients> chunks;

    ListedGradientBuffers(Arena &arena, const Problem &p) : Buffers(arena, p) {
        for (size_t i = 0; i < list.chunks.size(); ++i) chunks.push_back(ChunkGradients(arena, p));
    }
};

// The output gradients of a block's rows, and delta = grad . out less the gradient of the logarithm
// of the normaliser; `factor` is what divides weights at the scales `scale`, or at one if there are
// none: 2^(scale - log2 normaliser).
inline void load_listed_grads(const Problem &p, const ListPlace &place, int64_t block,
                              const float *out, const double *log_normaliser,
                              const float *grad_out, const float *grad_log, const float *scale,
                              ListedGradientBuffers &b) {
    b.q.block.rows = place.rows;
    for (int64_t r = 0; r < round_up(place.rows, kWidth); ++r) {
        float *grad = b.q.grad + r * p.padded_value;
        const int64_t query = r < place.rows ? place.query(block, r) : -1;
        b.q.delta[r] = 0;
        b.factor[r] = -kInfinity;
        for (int64_t c = 0; c < p.padded_value; ++c) grad[c] = 0;
        if (query < 0) continue;
        const int64_t row = place.row_of(query), column = row * p.value_dim;
        for (int64_t c = 0; c < p.value_dim; ++c) {
            grad[c] = grad_out[column + c];
            b.q.delta[r] += out[column + c] * grad[c];
        }
        b.q.delta[r] -= grad_log[row];
        const double log2_sum = log_normaliser[row] / std::log(2.0);
        if (log2_sum > -kInfinity) {
            b.factor[r] = static_cast<float>((scale ? scale[r] : 0.0f) - log2_sum);
        }
    }
    transpose(b.q.grad, p.padded_value, place.rows, p.padded_value, b.q.grad_transposed);
}

inline void multiply_rows(int64_t count, int64_t rows, const float *by, float *panel) {
    for (int64_t f = 0; f < count; ++f) {
        for (int64_t r = f * kBlock; r < f * kBlock + rows; r += kWidth) {
            store(panel + r, load(panel + r) * load(by + r));
        }
    }
}

// Gradients of the estimates of a block's pairs.
inline void estimate_gradients(const Problem &p, const ListPlace &place, int64_t block,
                               ListedGradientBuffers &b) {
    ListedBuffers &l = b.list;
    const performers_listed_call &call = place.listed;
    load_listed_grads(p, place, block, call.estimate, call.estimate_log, call.grad_estimate,
                      call.grad_estimate_log, l.scale, b);
    for (int64_t f = 0; f < p.features; ++f) {
        for (int64_t r = 0; r < place.rows; r += kWidth) {
            float *at = l.features + f * kBlock + r;
            store(at, load(at) * exp2(load(b.factor + r)));
        }
    }
    estimated_pairs(p, place, l);
    for (int64_t i = 0; i < p.features * kBlock; ++i) b.slope[i] = 0;
    for (size_t i = 0; i < l.chunks.size(); ++i) {
        const ListChunk &chunk = l.chunks[i];
        const int64_t keys = chunk.block.rows;
        b.pairs.load_grads(keys, chunk.value, b.q, kAll);
        chunk.for_pairs(place.rows, [&](int64_t at) {
            store(b.pairs.grads + at, chunk.where_met(at, load(b.pairs.grads + at), 0));
        });
        b.pairs.weights = chunk.pairs;
        b.pairs.add_to_queries(keys, b.q, chunk.features, kAll, b.slope);
        b.pairs.add_to_keys(keys, b.q, l.features, kAll, b.chunks[i].slope, b.chunks[i].value);
    }
    multiply_rows(p.features, place.rows, l.features, b.slope);
    b.inputs.add(place.head, l.queries, 0, p.features, b.slope, false);
}

// Gradients of the exact weights of a block's pairs; those of the queries go to b.grad_query.
inline void listed_exact_gradients(const Problem &p, const ListPlace &place, int64_t block,
                                   ListedGradientBuffers &b) {
    ListedBuffers &l = b.list;
    const performers_listed_call &call = place.listed;
    load_listed_grads(p, place, block, call.exact, call.exact_log, call.grad_exact,
                      call.grad_exact_log, nullptr, b);
    exact_scores(p, place, l);
    const Vector scale = splat(static_cast<float>(p.call.scale));
    for (size_t i = 0; i < l.chunks.size(); ++i) {
        const ListChunk &chunk = l.chunks[i];
        const int64_t keys = chunk.block.rows;
        b.pairs.load_grads(keys, chunk.value, b.q, kAll);
        chunk.for_pairs(place.rows, [&](int64_t at) {
            float *grad = b.pairs.grads + at;
            const Vector weight = exp2(load(chunk.pairs + at) + load(b.factor + at % kBlock));
            store(chunk.pairs + at, weight);
            store(grad, load(grad) * weight * scale);
        });
        sum_rows(p.padded_value, keys, place.rows, chunk.pairs, b.q.grad, b.chunks[i].value, true);
        sum_rows(p.padded_dim, keys, place.rows, b.pairs.grads, l.queries.x, b.chunks[i].key, true);
        combine(p.padded_dim, place.rows, keys, b.pairs.grads, chunk.block.x, b.grad_query, i > 0);
    }
}

// Writes the gradient of a row: what features give, and exact weights.
inline void write_both(const Problem &p, const Rows &to, int64_t r, float *features,
                       const float *exact) {
    for (int64_t c = 0; c < p.head_dim; ++c) features[c] += exact[c];
    write(to, r, p.head_dim, features);
}

inline void backward_list(const Problem &p, const ListPlace &place, ListedGradientBuffers &b) {
    if (place.first == place.last) return;
    ListedBuffers &l = b.list;
    load_list(p, place, l);
    for (const ChunkGradients &to : b.chunks) {
        for (int64_t i = 0; i < p.features * kBlock; ++i) to.slope[i] = 0;
        for (int64_t i = 0; i < kBlock * p.padded_dim; ++i) to.key[i] = 0;
        for (int64_t i = 0; i < kBlock * p.padded_value; ++i) to.value[i] = 0;
    }
    for (int64_t block = place.first; block < place.last; ++block) {
        load_listed_queries(p, place, block, l);
        estimate_gradients(p, place, block, b);
        listed_exact_gradients(p, place, block, b);
        for (int64_t r = 0; r < place.rows; ++r) {
            const int64_t query = place.query(block, r);
            if (query < 0) continue;
            write_both(p, p.rows(p.call.grad_query, place.head), query,
                       b.inputs.finish_row(l.queries, r), b.grad_query + r * p.padded_dim);
        }
    }
    const Rows keys = place.keys(p, p.call.grad_key), values = place.keys(p, p.call.grad_value);
    for (size_t i = 0; i < l.chunks.size(); ++i) {
        const ListChunk &chunk = l.chunks[i];
        const ChunkGradients &to = b.chunks[i];
        multiply_rows(p.features, chunk.block.rows, chunk.features, to.slope);
        b.inputs.add(place.head, chunk.block, 0, p.features, to.slope, true);
        for (int64_t t = 0; t < chunk.block.rows; ++t) {
            write_both(p, keys, chunk.start + t, b.inputs.finish_row(chunk.block, t),
                       to.key + t * p.padded_dim);
            write(values, chunk.start + t, p.value_dim, to.value + t * p.padded_value);
        }
    }
}

inline bool backward_listed(const performers_listed_call &call) {
    Problem p(call.call);
    const Weights weights(p);
    const WeightGradients trained(p);
    // Lists in the place of spans.
    const std::vector<Span> lists(static_cast<size_t>(call.lists));
    trained.for_spans<ListedGradientBuffers>(lists, [&](auto &b, int64_t, const Span &, int64_t i) {
        backward_list(p, ListPlace{call, i}, b);
    });
    trained.finish();
    return true;
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
