// Keys listed by content: blocks of queries against the list of keys that they share, each pair both
// with exp(scale q . k) and as its features estimate it. The caller takes the estimates out of the
// sums over all keys and puts the exact weights in their place.
//
// A task is a list of a head. The features of its keys are computed once for all its blocks, and no
// two tasks write to the same place.
#pragma once

#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The call that gives Problem the sizes and the weights of a listed one.
inline performers_call call_of(const performers_listed_call &listed) {
    performers_call call = {};
    call.batch = listed.batch;
    call.key_heads = listed.key_heads;
    call.groups = 1;
    call.length = listed.queries;
    call.size = listed.list_keys;
    call.head_dim = listed.head_dim;
    call.value_dim = listed.value_dim;
    call.features = listed.features;
    call.weight_heads = listed.weight_heads;
    call.kind = PERFORMERS_EXPONENTIAL;
    call.quadratic = 1;
    call.threads = listed.threads;
    call.window = -1;
    call.scale = listed.scale;
    call.normalizer = 1;
    call.weight = listed.weight;
    call.bias = listed.bias;
    call.grad_weight = listed.grad_weight;
    call.grad_bias = listed.grad_bias;
    return call;
}

// Contiguous rows of float32.
inline Rows plain_rows(const float *data, int64_t width) {
    return {reinterpret_cast<char *>(const_cast<float *>(data)), width, 1, PERFORMERS_FLOAT32};
}

// The keys of a list, kBlock at a time.
struct ListChunk : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    float *value = arena.take(kBlock * p.padded_value), *keep = arena.take(kBlock);
    // (features, kBlock), at the scales of the list
    float *features = arena.take(p.features * kBlock);
};

// Where a list lies in the tensors of a call.
struct ListPlace {
    int64_t head, list;
    int64_t first, last;  // its blocks

    ListPlace(const performers_listed_call &call, int64_t task)
        : head(task / call.lists), list(task % call.lists) {
        const int64_t *begins = call.list_begin + head * (call.lists + 1) + list;
        first = begins[0];
        last = begins[1];
    }

    int64_t keys(const performers_listed_call &call) const {
        return (head * call.lists + list) * call.list_keys;
    }
    int64_t places(const performers_listed_call &call, int64_t block) const {
        return (head * call.blocks + block) * call.rows;
    }
    // The query in each place of a block, among those of all heads; negative for none.
    int64_t query(const performers_listed_call &call, int64_t block, int64_t r) const {
        const int64_t row = call.row[places(call, block) + r];
        return row < 0 ? -1 : head * call.queries + row;
    }
};

struct ListedBuffers {
    std::vector<ListChunk> chunks;
    float *log_scale, *unweighted;        // (features)
    Block queries;
    float *features;                      // of the queries (features, kBlock)
    float *scale, *normaliser;            // (kBlock)
    float *met;                           // (keys of the list, kBlock): one for pairs that meet
    float *pairs;                         // likewise
    float *out;                           // (kBlock, padded_value)

    ListedBuffers(Arena &arena, const Problem &p)
        : log_scale(arena.take(p.features)),
          unweighted(arena.take(p.features)),
          queries(arena, p),
          features(arena.take(p.features * kBlock)),
          scale(arena.take(kBlock)),
          normaliser(arena.take(kBlock)),
          met(arena.take(round_up(p.call.size, kBlock) * kBlock)),
          pairs(arena.take(round_up(p.call.size, kBlock) * kBlock)),
          out(arena.take(kBlock * p.padded_value)) {
        for (int64_t i = 0; i < p.call.size; i += kBlock) chunks.push_back(ListChunk(arena, p));
    }
};

// The keys and values of a list, and their features.
inline void load_list(const Problem &p, const performers_listed_call &call, const ListPlace &place,
                      ListedBuffers &b) {
    const int64_t begin = place.keys(call);
    const Rows keys = plain_rows(call.key + begin * p.head_dim, p.head_dim);
    const Rows values = plain_rows(call.value + begin * p.value_dim, p.value_dim);
    for (int64_t f = 0; f < p.features; ++f) {
        b.log_scale[f] = -kInfinity;
        b.unweighted[f] = 0;
    }
    int64_t start = 0;
    for (ListChunk &chunk : b.chunks) {
        const int64_t count = smaller(kBlock, call.list_keys - start);
        uint8_t taken[kBlock];
        for (int64_t t = 0; t < count; ++t) taken[t] = call.position[begin + start + t] >= 0;
        const auto from = [&](const Rows &rows) {
            return Rows{rows.row(start), rows.row_stride, rows.column_stride, rows.type};
        };
        chunk.block.load_keys(p, from(keys), taken, 0, count, chunk.keep);
        load_values(p, from(values), 0, count, chunk.keep, chunk.value);
        project(p, p.weights_of(place.head), chunk.block, p.key_inner, 0, p.features,
                chunk.features);
        for (int64_t f = 0; f < p.features; ++f) {
            b.log_scale[f] = largest(peaks(chunk.features + f * kBlock, count, b.log_scale[f]));
        }
        start += kBlock;
    }
    for (const ListChunk &chunk : b.chunks) {
        for (int64_t f = 0; f < p.features; ++f) {
            exponentiate(chunk.features + f * kBlock, chunk.block.rows, b.log_scale[f]);
        }
    }
}

// Which pairs of a block meet.
inline void load_met(const performers_listed_call &call, const ListPlace &place, int64_t block,
                     float *met) {
    int32_t positions[kBlock];
    // No key is as far from a place without a query.
    constexpr int32_t nowhere = INT32_MIN;
    for (int64_t r = 0; r < kBlock; ++r) {
        const int64_t row = r < call.rows ? call.row[place.places(call, block) + r] : -1;
        positions[r] = row < 0 ? nowhere : static_cast<int32_t>(row % call.length);
    }
    const int64_t *keys = call.position + place.keys(call);
    const uint8_t *hidden =
        call.hidden ? call.hidden + place.places(call, block) * call.list_keys : nullptr;
    const int32_t window = static_cast<int32_t>(smaller<int64_t>(call.window, INT32_MAX));
    for (int64_t t = 0; t < call.list_keys; ++t) {
        const int32_t key = static_cast<int32_t>(keys[t]);
        float *row = met + t * kBlock;
        for (int64_t r = 0; r < kBlock; ++r) {
            const bool some = key >= 0 && positions[r] != nowhere;
            const int32_t distance = some ? positions[r] - key : 0;
            row[r] = some && (distance > window || -distance > window) ? 1.0f : 0.0f;
        }
        if (!hidden) continue;
        for (int64_t r = 0; r < call.rows; ++r) row[r] = hidden[t * call.rows + r] ? 0.0f : row[r];
    }
}

// A block of queries, their features at the scales of the list, and the pairs that meet.
inline void load_listed_queries(const Problem &p, const performers_listed_call &call,
                                const ListPlace &place, int64_t block, ListedBuffers &b) {
    b.queries.load_rows(p, plain_rows(call.query, p.head_dim), call.rows,
                        [&](int64_t r) { return place.query(call, block, r); });
    project(p, p.weights_of(place.head), b.queries, p.query_inner, 0, p.features, b.features);
    query_features(p, b.features, call.rows, b.log_scale, b.unweighted, b.scale, b.normaliser);
    load_met(call, place, block, b.met);
}

// Puts `other` in place of the pairs (keys, kBlock) that do not meet.
inline void clear_unmet(const performers_listed_call &call, const float *met, int64_t keys,
                        float other, float *pairs) {
    const Vector zero = splat(0.0f), instead = splat(other);
    for (int64_t t = 0; t < keys; ++t) {
        for (int64_t r = 0; r < call.rows; r += kWidth) {
            float *at = pairs + t * kBlock + r;
            store(at, load(met + t * kBlock + r) > zero ? load(at) : instead);
        }
    }
}

inline void estimated_pairs(const Problem &p, const performers_listed_call &call,
                            ListedBuffers &b) {
    for (size_t i = 0; i < b.chunks.size(); ++i) {
        multiply(b.chunks[i].block.rows, call.rows, p.features,
                 columns_of(b.chunks[i].features, kBlock), b.features, kBlock,
                 b.pairs + static_cast<int64_t>(i) * kBlock * kBlock, kBlock, false);
    }
    clear_unmet(call, b.met, call.list_keys, 0.0f, b.pairs);
}

// Binary logarithms of the exact weights.
inline void exact_scores(const Problem &p, const performers_listed_call &call, ListedBuffers &b) {
    const Vector unit = splat(score_unit(p));
    for (size_t i = 0; i < b.chunks.size(); ++i) {
        float *pairs = b.pairs + static_cast<int64_t>(i) * kBlock * kBlock;
        multiply(b.chunks[i].block.rows, call.rows, p.head_dim,
                 rows_of(b.chunks[i].block.x, p.padded_dim), b.queries.transposed, kBlock, pairs,
                 kBlock, false);
        for (int64_t t = 0; t < b.chunks[i].block.rows; ++t) {
            for (int64_t r = 0; r < call.rows; r += kWidth) {
                float *at = pairs + t * kBlock + r;
                store(at, load(at) * unit);
            }
        }
    }
    clear_unmet(call, b.met, call.list_keys, -kInfinity, b.pairs);
}

// Weights (keys, kBlock) of a block's rows at the binary logarithms `b.scale`: normalised rows, and
// the natural logarithms of their normalisers.
inline void write_listed_rows(const Problem &p, const performers_listed_call &call,
                              const ListPlace &place, int64_t block, ListedBuffers &b, float *out,
                              double *log_normaliser) {
    for (int64_t r = 0; r < kBlock; ++r) b.normaliser[r] = 0;
    add_up(b.pairs, call.list_keys, call.rows, b.normaliser);
    for (size_t i = 0; i < b.chunks.size(); ++i) {
        multiply(call.rows, p.padded_value, b.chunks[i].block.rows,
                 columns_of(b.pairs + static_cast<int64_t>(i) * kBlock * kBlock, kBlock),
                 b.chunks[i].value, p.padded_value, b.out, p.padded_value, i > 0);
    }
    for (int64_t r = 0; r < call.rows; ++r) {
        const int64_t query = place.query(call, block, r);
        if (query < 0) continue;
        const float sum = b.normaliser[r], inverse = inverse_of(sum);
        float *to = out + query * p.value_dim;
        for (int64_t c = 0; c < p.value_dim; ++c) to[c] = b.out[r * p.padded_value + c] * inverse;
        log_normaliser[query] =
            sum > 0 ? b.scale[r] * std::log(2.0) + std::log(static_cast<double>(sum)) : -kInfinity;
    }
}

inline void forward_list(const Problem &p, const performers_listed_call &call,
                         const ListPlace &place, ListedBuffers &b) {
    if (place.first == place.last) return;
    load_list(p, call, place, b);
    for (int64_t block = place.first; block < place.last; ++block) {
        load_listed_queries(p, call, place, block, b);
        estimated_pairs(p, call, b);
        write_listed_rows(p, call, place, block, b, call.estimate, call.estimate_log);
        exact_scores(p, call, b);
        for (int64_t r = 0; r < call.rows; r += kWidth) {
            Vector peak = splat(kLowest);
            for (int64_t t = 0; t < call.list_keys; ++t) {
                peak = maximum(peak, load(b.pairs + t * kBlock + r));
            }
            for (int64_t t = 0; t < call.list_keys; ++t) {
                float *at = b.pairs + t * kBlock + r;
                store(at, exp2(load(at) - peak));
            }
            store(b.scale + r, peak);
        }
        write_listed_rows(p, call, place, block, b, call.exact, call.exact_log);
    }
}

inline void forward_listed(const performers_listed_call &call) {
    const performers_call sizes = call_of(call);
    Problem p(sizes);
    const Weights weights(p);
    parallel(p, p.heads * call.lists, [&](int64_t i) {
        auto b = in_scratch<ListedBuffers>(p);
        forward_list(p, call, ListPlace(call, i), b);
    });
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
