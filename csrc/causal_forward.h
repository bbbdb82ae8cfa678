// Causal attention: chunks of kBlock positions, running sums between them, pairs within them. With a
// window the keys are those that leave it: row i + shift of the keys goes with query i, which sees
// the rows before that.
//
// Keys and queries of a chunk stand at one scale per feature, its largest exponent over the past
// and the chunk: products of features are then at most one, and float32 keeps every pair that
// matters as long as a row's normaliser is not tiny. A key later in the chunk can make it tiny;
// such a row (its normaliser tells) is computed again by itself, at the scale of what it may see.
// So no later position moves an earlier row by more than rounding.
#pragma once

#include "bidirectional_forward.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Products below 2^-126 count as zero. A row whose normaliser exceeds this lost nothing by it: the
// normaliser is exact with up to 2^60 of them, and the sums of values too unless these are smaller
// than 1e-18, or one of them 1e18 times as large as the rest.
constexpr float kSmallestNormaliser = 0x1p-40f;

// The keys of one chunk, and the sums over those before it.
struct ChunkKeys : KeyBlock {
    using KeyBlock::KeyBlock;

    // (features, kBlock), at the scale of `sums` after the chunk
    float *features = arena.take(p.features * kBlock);
    // likewise, before any scale; filled when a row needs them
    float *exponents = arena.take(p.features * kBlock);
    float *added_sum = arena.take(p.features);  // sums over the chunk's keys (features)
    float *decays = arena.take(p.features);  // what the past is multiplied with (features)
    float *past_scale = arena.take(p.features);  // log scales before the chunk (features)
    // key sums before the chunk, at those scales (features)
    float *past_sum = arena.take(p.features);
    // rows of the past that `advance` rescaled, as they were
    float *past_value = arena.take(p.features * p.padded_value);
    bool has_exponents = false;

    // The keys of the queries from `begin` on: theirs, or those that leave their windows.
    void fetch(int64_t head, const Span &span, int64_t begin, int64_t rows) {
        load_keys(head, begin + p.shift, rows, span.first);
        project(p, head, block, 0, p.features, features);
        has_exponents = false;
    }

    void load_exponents(int64_t head) {
        if (!has_exponents) project(p, head, block, 0, p.features, exponents);
        has_exponents = true;
    }

    // Computes features at the scales after the chunk, and brings the past to these scales, keeping
    // what it changes.
    void advance(const Sums &sums) {
        for (int64_t f = 0; f < p.features; ++f) {
            past_scale[f] = sums.log_scale[f];
            past_sum[f] = sums.key_sum[f];
            decays[f] = 1;
        }
        if (p.exponential) {
            for (int64_t f = 0; f < p.features; ++f) {
                const Vector peak = peaks(features + f * kBlock, block.rows, -kInfinity);
                if (!any_greater(peak, splat(past_scale[f]))) continue;
                sums.log_scale[f] = largest(peak);
                decays[f] = decay(past_scale[f], sums.log_scale[f]);
                std::memcpy(past_value + f * p.padded_value, sums.row(f),
                            sizeof(float) * static_cast<size_t>(p.padded_value));
                sums.scale_row(f, decays[f]);
            }
        }
        compute_features(sums.log_scale);
    }

    // Features at the given scales, and their sums.
    void compute_features(const float *log_scale) {
        if (!p.exponential) rectify(p, features, p.features, block.rows, keep);
        for (int64_t f = 0; f < p.features; ++f) {
            float *row = features + f * kBlock;
            added_sum[f] = p.exponential ? exponentiate(row, block.rows, log_scale[f])
                                         : sum_feature(row, block.rows);
        }
    }

    // The first query of the chunk that sees a key, in it or before it.
    int64_t first_seen() const {
        for (int64_t f = 0; f < p.features; ++f) {
            if (past_scale[f] > -kInfinity) return 0;
        }
        int64_t first = 0;
        while (first < block.rows && keep[first] == 0) ++first;
        return first + (p.strict ? 1 : 0);
    }

    // Row f of the past's values at its own scale, after `advance`.
    const float *past_row(const Sums &sums, int64_t f) const {
        return decays[f] == 1 ? sums.row(f) : past_value + f * p.padded_value;
    }

    // Adds the chunk.
    void add(const Sums &sums) const {
        for (int64_t f = 0; f < p.features; ++f) sums.key_sum[f] += added_sum[f];
        sum_rows(p.padded_value, p.features, block.rows, features, value, sums.key_value, true);
    }
};

// How many keys of its chunk a row sees, and all such pairs.
inline int64_t seen_keys(const Problem &p, int64_t row) { return p.strict ? row : row + 1; }
inline Band seen_pairs(const Problem &p) { return {-kUnbounded, p.strict ? -1 : 0}; }

// One row of a chunk at the scale of what it may see.
struct MendedRow : Buffers {
    using Buffers::Buffers;

    // of the query, less the row's scale (padded features)
    float *exponents = arena.take(p.features);
    // its features at the scale of the past (padded features)
    float *past = arena.take(p.features);
    float *pairs = arena.take(kBlock);  // with the chunk's keys (kBlock)
    float scale, normaliser;

    // `query` (features, kBlock): the exponents of the chunk's queries. Key exponents are loaded.
    void compute(const float *query, int64_t row, const ChunkKeys &keys) {
        const int64_t seen = seen_keys(p, row), used = round_up(seen, kWidth);
        Vector peaks[kBlock / kWidth];
        for (int64_t j = 0; j < used; j += kWidth) peaks[j / kWidth] = splat(-kInfinity);
        scale = -kInfinity;
        for (int64_t f = 0; f < p.features; ++f) {
            const float exponent = query[f * kBlock + row];
            scale = larger(scale, exponent + keys.past_scale[f]);
            for (int64_t j = 0; j < used; j += kWidth) {
                peaks[j / kWidth] = maximum(
                    peaks[j / kWidth], load(keys.exponents + f * kBlock + j) + splat(exponent));
            }
        }
        for (int64_t j = 0; j < used; j += kWidth) store(pairs + j, peaks[j / kWidth]);
        for (int64_t j = 0; j < seen; ++j) scale = larger(scale, pairs[j]);
        compute_at(query, row, keys, finite(scale));
        normaliser = 0;
        for (int64_t f = 0; f < p.features; ++f) normaliser += past[f] * keys.past_sum[f];
        for (int64_t j = 0; j < seen; ++j) normaliser += pairs[j];
    }

    // The same at a known scale, without the normaliser.
    void compute_at(const float *query, int64_t row, const ChunkKeys &keys, float known) {
        const int64_t seen = seen_keys(p, row), used = round_up(seen, kWidth);
        Vector sums[kBlock / kWidth];
        for (int64_t j = 0; j < used; j += kWidth) sums[j / kWidth] = splat(0.0f);
        scale = known;
        for (int64_t f = 0; f < p.features; ++f) {
            exponents[f] = query[f * kBlock + row] - scale;
            past[f] = exp2(exponents[f] + keys.past_scale[f]);
            for (int64_t j = 0; j < used; j += kWidth) {
                sums[j / kWidth] += pair_feature(keys, f, j);
            }
        }
        for (int64_t j = 0; j < used; j += kWidth) store(pairs + j, sums[j / kWidth]);
        for (int64_t j = seen; j < used; ++j) pairs[j] = 0;
    }

    // Feature f of the row's pairs with the keys from j on. Those the row may not see can be of any
    // size; they are bounded, to be multiplied with zero.
    Vector pair_feature(const ChunkKeys &keys, int64_t f, int64_t j) const {
        const Vector exponent = load(keys.exponents + f * kBlock + j) + splat(exponents[f]);
        return exp2(minimum(splat(1.0f), exponent));
    }
};

struct CausalBuffers : Buffers {
    using Buffers::Buffers;

    ChunkKeys keys{arena, p};
    QueryBuffers q{arena, p};
    MendedRow mended{arena, p};
    float *pairs = arena.take(kBlock * kBlock), *query_exponents = arena.take(p.features * kBlock);
    Sums sums{arena, p};
};

// What exact pairs add to the normaliser of row r, at the scale of its features.
inline float exact_share(const Problem &p, int64_t r, const QueryBuffers &q) {
    if (!p.exact) return 0;
    const float scale = q.exact.scale[r] - q.exact.offset[r] - q.scale[r];
    return q.exact.normaliser[r] * exp2(smaller(scale, 100.0f));
}

// Rows whose normaliser says that pairs may have been lost: all of them again, one by one.
inline void mend_rows(const Problem &p, int64_t head, const Sums &sums, CausalBuffers &b) {
    bool ready = false;
    for (int64_t r = b.keys.first_seen(); r < b.q.block.rows; ++r) {
        // Written so that a normaliser which is not a number is left alone.
        if (!(b.q.normaliser[r] < kSmallestNormaliser)) continue;
        if (exact_share(p, r, b.q) >= kSmallestNormaliser) continue;
        if (!ready) {
            b.keys.load_exponents(head);
            project(p, head, b.q.block, 0, p.features, b.query_exponents);
            ready = true;
        }
        b.mended.compute(b.query_exponents, r, b.keys);
        float *out = b.q.out + r * p.padded_value;
        for (int64_t c = 0; c < p.padded_value; c += kWidth) {
            Vector sum = splat(0.0f);
            for (int64_t f = 0; f < p.features; ++f) {
                sum += load(b.keys.past_row(sums, f) + c) * splat(b.mended.past[f]);
            }
            for (int64_t j = 0; j < seen_keys(p, r); ++j) {
                sum += load(b.keys.value + j * p.padded_value + c) * splat(b.mended.pairs[j]);
            }
            store(out + c, sum);
        }
        b.q.scale[r] = b.mended.scale;
        b.q.normaliser[r] = -b.mended.normaliser;
    }
}

// The positions of a span in all groups of a head, after the keys in b.sums, which gain theirs.
inline void causal_rows(const Problem &p, int64_t head, const Span &span, CausalBuffers &b) {
    QueryBuffers &q = b.q;
    const Band band = seen_pairs(p);
    for (int64_t start = span.begin; start < span.end; start += kBlock) {
        const int64_t rows = smaller(kBlock, span.end - start);
        b.keys.fetch(head, span, start, rows);
        b.keys.advance(b.sums);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            q.block.load_queries(p.rows(p.call.query, head, group), start, rows);
            read_sums(p, head, b.sums, q);
            feature_pairs(p, rows, rows, b.keys.features, q.features, band, b.pairs);
            add_up(b.pairs, rows, rows, q.normaliser);
            combine(p.padded_value, rows, rows, b.pairs, b.keys.value, q.out, true, by_row(band));
            if (p.exact) exact_sums(p, head, span, start, q);
            if (p.exponential) mend_rows(p, head, b.sums, b);
            if (p.exact) add_exact(p, q);
            finish_rows(p, head, group, start, q);
        }
        b.keys.add(b.sums);
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
