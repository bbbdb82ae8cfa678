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

// The keys of a list, kBlock at a time, and their pairs with a block of queries.
struct ListChunk : KeyBlock {
    using KeyBlock::KeyBlock;

    // (features, kBlock), at the scales of the list
    float *features = arena.take(p.features * kBlock);
    // (kBlock keys, kBlock queries): one for pairs that meet; the pairs
    float *met = arena.take(kBlock * kBlock), *pairs = arena.take(kBlock * kBlock);
    int64_t start = 0;  // in the list

    // Calls visit(at) for the vectors of pairs, `at` counted from the first.
    template <typename Visit>
    void for_pairs(int64_t rows, Visit &&visit) const {
        for (int64_t t = 0; t < block.rows; ++t) {
            for (int64_t r = 0; r < rows; r += kWidth) visit(t * kBlock + r);
        }
    }

    // `to` where pairs meet, `other` elsewhere.
    Vector where_met(int64_t at, Vector x, float other) const {
        return load(met + at) > splat(0.0f) ? x : splat(other);
    }
};

// Where a list lies in the tensors of a call.
struct ListPlace {
    const performers_listed_call &listed;
    int64_t task;
    int64_t head = task / listed.lists, list = task % listed.lists;
    const int64_t *begins = listed.list_begin + head * (listed.lists + 1) + list;
    int64_t first = begins[0], last = begins[1];  // its blocks
    int64_t rows = listed.rows;                   // places in a block

    Rows keys(const Problem &p, const performers_array &array) const {
        return p.rows(array, head, list);
    }
    const int64_t *positions() const {
        return listed.position + (head * listed.lists + list) * listed.call.size;
    }
    int64_t places(int64_t block) const { return (head * listed.blocks + block) * listed.rows; }
    // The query in each place of a block; negative for none.
    int64_t query(int64_t block, int64_t r) const { return listed.row[places(block) + r]; }
    // The same among those of all heads.
    int64_t row_of(int64_t query) const {
        return head * listed.call.groups * listed.call.length + query;
    }
};

struct ListedBuffers : Buffers {
    float *log_scale = arena.take(p.features), *unweighted = arena.take(p.features);
    Block queries{arena, p};
    float *features = arena.take(p.features * kBlock);  // of the queries (features, kBlock)
    float *scale = arena.take(kBlock), *normaliser = arena.take(kBlock);
    float *out = arena.take(kBlock * p.padded_value);
    std::vector<ListChunk> chunks;

    ListedBuffers(Arena &arena, const Problem &p) : Buffers(arena, p) {
        for (int64_t i = 0; i < p.call.size; i += kBlock) {
            chunks.push_back(ListChunk(arena, p));
            chunks.back().start = i;
        }
    }
};

// The keys and values of a list, and their features.
inline void load_list(const Problem &p, const ListPlace &place, ListedBuffers &b) {
    const Rows keys = place.keys(p, p.call.key), values = place.keys(p, p.call.value);
    for (int64_t f = 0; f < p.features; ++f) {
        b.log_scale[f] = -kInfinity;
        b.unweighted[f] = 0;
    }
    for (ListChunk &chunk : b.chunks) {
        const int64_t count = smaller(kBlock, p.call.size - chunk.start);
        uint8_t taken[kBlock];
        for (int64_t t = 0; t < count; ++t) taken[t] = place.positions()[chunk.start + t] >= 0;
        chunk.block.load_keys(keys.from(chunk.start), taken, 0, count, chunk.keep);
        load_values(p, values.from(chunk.start), 0, count, chunk.keep, chunk.value);
        project(p, place.head, chunk.block, 0, p.features, chunk.features);
        for (int64_t f = 0; f < p.features; ++f) {
            b.log_scale[f] = largest(peaks(chunk.features + f * kBlock, count, b.log_scale[f]));
        }
    }
    for (const ListChunk &chunk : b.chunks) {
        for (int64_t f = 0; f < p.features; ++f) {
            exponentiate(chunk.features + f * kBlock, chunk.block.rows, b.log_scale[f]);
        }
    }
}

// The pairs of a block with a chunk that meet.
inline void load_met(const Problem &p, const ListPlace &place, int64_t block, const ListChunk &chunk) {
    int32_t positions[kBlock];
    // No key is as far from a place without a query.
    constexpr int32_t nowhere = INT32_MIN;
    for (int64_t r = 0; r < kBlock; ++r) {
        const int64_t row = r < place.rows ? place.query(block, r) : -1;
        positions[r] = row < 0 ? nowhere : static_cast<int32_t>(row % p.call.length);
    }
    const int64_t *keys = place.positions() + chunk.start;
    const uint8_t *hidden = place.listed.hidden;
    if (hidden) hidden += place.places(block) * p.call.size + chunk.start * place.rows;
    const int32_t window = static_cast<int32_t>(smaller<int64_t>(p.call.window, INT32_MAX));
    for (int64_t t = 0; t < chunk.block.rows; ++t) {
        const int32_t key = static_cast<int32_t>(keys[t]);
        float *row = chunk.met + t * kBlock;
        for (int64_t r = 0; r < kBlock; ++r) {
            const bool some = key >= 0 && positions[r] != nowhere;
            const int32_t distance = some ? positions[r] - key : 0;
            row[r] = some && (distance > window || -distance > window) ? 1.0f : 0.0f;
        }
        if (!hidden) continue;
        for (int64_t r = 0; r < place.rows; ++r) row[r] = hidden[t * place.rows + r] ? 0.0f : row[r];
    }
}

// A block of queries, their features at the scales of the list, and the pairs that meet.
inline void load_listed_queries(const Problem &p, const ListPlace &place, int64_t block,
                                ListedBuffers &b) {
    b.queries.load_rows(p.rows(p.call.query, place.head), place.rows,
                        [&](int64_t r) { return place.query(block, r); });
    project(p, place.head, b.queries, 0, p.features, b.features);
    query_features(p, b.features, place.rows, b.log_scale, b.unweighted, b.scale, b.normaliser);
    for (const ListChunk &chunk : b.chunks) load_met(p, place, block, chunk);
}

inline void estimated_pairs(const Problem &p, const ListPlace &place, ListedBuffers &b) {
    for (const ListChunk &chunk : b.chunks) {
        multiply(chunk.block.rows, place.rows, p.features, columns_of(chunk.features, kBlock),
                 b.features, kBlock, chunk.pairs, kBlock, false);
        chunk.for_pairs(place.rows, [&](int64_t at) {
            store(chunk.pairs + at, chunk.where_met(at, load(chunk.pairs + at), 0));
        });
    }
}

// Binary logarithms of the exact weights.
inline void exact_scores(const Problem &p, const ListPlace &place, ListedBuffers &b) {
    const Vector unit = splat(score_unit(p));
    for (const ListChunk &chunk : b.chunks) {
        multiply(chunk.block.rows, place.rows, p.head_dim, rows_of(chunk.block.x, p.padded_dim),
                 b.queries.transposed, kBlock, chunk.pairs, kBlock, false);
        chunk.for_pairs(place.rows, [&](int64_t at) {
            store(chunk.pairs + at, chunk.where_met(at, load(chunk.pairs + at) * unit, -kInfinity));
        });
    }
}

// Weights (keys, kBlock) of a block's rows at the binary logarithms `b.scale`: normalised rows, and
// the natural logarithms of their normalisers.
inline void write_listed_rows(const Problem &p, const ListPlace &place, int64_t block,
                              ListedBuffers &b, float *out, double *log_normaliser) {
    for (int64_t r = 0; r < kBlock; ++r) b.normaliser[r] = 0;
    for (const ListChunk &chunk : b.chunks) {
        add_up(chunk.pairs, chunk.block.rows, place.rows, b.normaliser);
        combine(p.padded_value, place.rows, chunk.block.rows, chunk.pairs, chunk.value, b.out,
                chunk.start > 0);
    }
    for (int64_t r = 0; r < place.rows; ++r) {
        const int64_t query = place.query(block, r);
        if (query < 0) continue;
        const float sum = b.normaliser[r], inverse = inverse_of(sum);
        const int64_t row = place.row_of(query);
        float *to = out + row * p.value_dim;
        for (int64_t c = 0; c < p.value_dim; ++c) to[c] = b.out[r * p.padded_value + c] * inverse;
        log_normaliser[row] =
            sum > 0 ? b.scale[r] * std::log(2.0) + std::log(static_cast<double>(sum)) : -kInfinity;
    }
}

inline void forward_list(const Problem &p, const ListPlace &place, ListedBuffers &b) {
    if (place.first == place.last) return;
    load_list(p, place, b);
    for (int64_t block = place.first; block < place.last; ++block) {
        load_listed_queries(p, place, block, b);
        estimated_pairs(p, place, b);
        write_listed_rows(p, place, block, b, place.listed.estimate, place.listed.estimate_log);
        exact_scores(p, place, b);
        for (int64_t r = 0; r < kBlock; ++r) b.scale[r] = kLowest;
        for (const ListChunk &chunk : b.chunks) {
            chunk.for_pairs(place.rows, [&](int64_t at) {
                float *scale = b.scale + at % kBlock;
                store(scale, maximum(load(scale), load(chunk.pairs + at)));
            });
        }
        for (const ListChunk &chunk : b.chunks) {
            chunk.for_pairs(place.rows, [&](int64_t at) {
                store(chunk.pairs + at, exp2(load(chunk.pairs + at) - load(b.scale + at % kBlock)));
            });
        }
        write_listed_rows(p, place, block, b, place.listed.exact, place.listed.exact_log);
    }
}

inline bool forward_listed(const performers_listed_call &call) {
    Problem p(call.call);
    const Weights weights(p);
    parallel(p, p.heads * call.lists, [&](int64_t i) {
        auto b = in_scratch<ListedBuffers>(p);
        forward_list(p, ListPlace{call, i}, b);
    });
    return true;
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
