// Bidirectional attention with a window: what lies outside it, through features.
//
// A block of queries reads the sums over the keys that lie before the windows of all its rows and
// after them, and meets one by one the few blocks of keys that only some of its rows reach. So the
// sums over each block of keys are kept, and added up from both ends: the features of a key are
// computed once. All stand at one scale, the largest exponent of each feature over all keys. That
// loses nothing, as the key it belongs to is one that a row meets: among its features' sums, or
// exactly, where its weight bounds from below what its features could have hidden.
#pragma once

#include "exact_gradients.h"

namespace performers::PERFORMERS_ISA {
namespace {

// How the blocks of keys and of queries of a sequence lie to each other. Blocks of keys begin where
// windows of blocks of queries do.
struct FarGrid {
    Span span;
    int64_t window;
    int64_t origin;  // row where key block 0 begins, at or before the first key
    int64_t key_blocks, query_blocks;

    FarGrid(const Problem &p, const Span &span)
        : span(span),
          window(p.window),
          origin(span.first - p.window % kBlock),
          key_blocks((span.last - origin + kBlock - 1) / kBlock),
          query_blocks((span.end - span.begin + kBlock - 1) / kBlock) {}

    int64_t query_begin(int64_t b) const { return span.begin + b * kBlock; }
    int64_t query_rows(int64_t b) const { return smaller(kBlock, span.end - query_begin(b)); }
    int64_t key_begin(int64_t c) const { return origin + c * kBlock; }
    int64_t key_rows(int64_t c) const { return smaller(kBlock, span.last - key_begin(c)); }

    // The block of keys that some queries of block b reach over the lower end of their windows; all
    // reach those before it.
    int64_t past(int64_t b) const { return b - window / kBlock; }
    // The blocks of keys from future(b) to full(b) are those that some queries reach over the upper
    // end; all reach those from full(b) on.
    int64_t future(int64_t b) const {
        return smaller(key_blocks, (query_begin(b) + window + 1 - origin) / kBlock);
    }
    int64_t full(int64_t b) const {
        const int64_t end = query_begin(b) + window + query_rows(b) - origin;
        return smaller(key_blocks, (end + kBlock - 1) / kBlock);
    }

    // Key minus query, as places in their blocks, for the pairs of two blocks that lie beyond the
    // lower, or the upper end of windows.
    Band before() const { return {-kUnbounded, -1}; }
    Band after(int64_t b, int64_t c) const {
        return {query_begin(b) + window + 1 - key_begin(c), kUnbounded};
    }

    // Whether any query reaches block c of the keys through features.
    bool needed(int64_t c) const { return c <= past(query_blocks - 1) || c >= future(0); }
    bool reaches() const { return past(query_blocks - 1) >= 0 || future(0) < key_blocks; }
    // Whether any row of block b reaches a key through features.
    bool reaches(int64_t b) const { return past(b) >= 0 || future(b) < key_blocks; }

    // Calls visit(c, band) for the blocks of keys that some rows of block b reach.
    template <typename Visit>
    void for_partial_keys(int64_t b, Visit &&visit) const {
        if (past(b) >= 0 && past(b) < key_blocks) visit(past(b), before());
        for (int64_t c = future(b); c < full(b); ++c) visit(c, after(b, c));
    }
    // Calls visit(b, band) for the blocks of queries of which some rows reach block c.
    template <typename Visit>
    void for_partial_queries(int64_t c, Visit &&visit) const {
        const int64_t before_it = c + window / kBlock;
        if (before_it < query_blocks) visit(before_it, before());
        const int64_t about = (key_begin(c) - window - 1 - span.begin) / kBlock - 1;
        for (int64_t b = larger<int64_t>(0, about); b < query_blocks && future(b) <= c; ++b) {
            if (c < full(b)) visit(b, after(b, c));
        }
    }
};

// The memory of one sequence of a head.
struct FarUnit {
    int64_t head;
    FarGrid grid;
    float *features = nullptr;        // (key blocks, features, kBlock)
    float *sums = nullptr;            // (key blocks, Sums): over a block of keys; then gradients
    float *reached = nullptr;         // (query blocks, Sums): over the keys all rows reach; likewise
    float *log_scale = nullptr;       // (features)
    // The backward pass: (query blocks, groups, features, kBlock) and (query blocks, groups, kBlock).
    float *query_features = nullptr, *delta = nullptr;

    static int64_t block_size(const Problem &p) { return p.features * kBlock; }

    void place(Arena &arena, const Problem &p, bool backward) {
        if (!grid.reaches()) return;
        features = arena.take(grid.key_blocks * block_size(p));
        sums = arena.take(grid.key_blocks * Sums::size(p));
        reached = arena.take(grid.query_blocks * Sums::size(p));
        log_scale = arena.take(p.features);
        if (!backward) return;
        query_features = arena.take(grid.query_blocks * p.call.groups * block_size(p));
        delta = arena.take(grid.query_blocks * p.call.groups * kBlock);
    }

    float *features_of(const Problem &p, int64_t c) const { return features + c * block_size(p); }
    float *query_features_of(const Problem &p, int64_t b, int64_t group) const {
        return query_features + (b * p.call.groups + group) * block_size(p);
    }
    float *delta_of(const Problem &p, int64_t b, int64_t group) const {
        return delta + (b * p.call.groups + group) * kBlock;
    }
    Sums sums_of(const Problem &p, int64_t c) const { return Sums(sums + c * Sums::size(p), p); }
    // Sums for block b of the queries, at the scale of all.
    Sums reached_by(const Problem &p, int64_t b) const {
        Sums result(reached + b * Sums::size(p), p);
        result.log_scale = log_scale;
        return result;
    }
};

struct FarKeyBuffers {
    Block block;
    float *value, *keep, *log_scale;

    FarKeyBuffers(Arena &arena, const Problem &p)
        : block(arena, p),
          value(arena.take(kBlock * p.padded_value)),
          keep(arena.take(kBlock)),
          log_scale(arena.take(p.features)) {}
};

// Features and sums of the key blocks [begin, end), each at the largest exponents up to it.
inline void far_keys(const Problem &p, const FarUnit &unit, int64_t begin, int64_t end,
                     FarKeyBuffers &b) {
    const FarGrid &grid = unit.grid;
    const Rows keys = p.key_rows(p.call.key, unit.head);
    const Rows values = p.key_rows(p.call.value, unit.head);
    for (int64_t f = 0; f < p.features; ++f) b.log_scale[f] = -kInfinity;
    for (int64_t c = begin; c < end; ++c) {
        if (!grid.needed(c)) continue;
        const int64_t start = grid.key_begin(c), rows = grid.key_rows(c);
        b.block.load_keys(p, keys, p.mask(unit.head), start, rows, b.keep, grid.span.first);
        load_values(p, values, start, rows, b.keep, b.value);
        float *features = unit.features_of(p, c);
        const Sums sums = unit.sums_of(p, c);
        for (int64_t first = 0; first < p.features; first += kPanel) {
            const int64_t count = smaller(kPanel, p.features - first);
            float *panel = features + first * kBlock;
            project(p, p.weights_of(unit.head), b.block, p.key_inner, first, count, panel);
            for (int64_t f = first; f < first + count; ++f) {
                float *row = features + f * kBlock;
                Vector peak = splat(b.log_scale[f]), sum = splat(0.0f);
                for (int64_t r = 0; r < rows; r += kWidth) peak = maximum(peak, load(row + r));
                sums.log_scale[f] = b.log_scale[f] = largest(peak);
                const Vector scale = splat(finite(b.log_scale[f]));
                for (int64_t r = 0; r < rows; r += kWidth) {
                    const Vector phi = exp2(load(row + r) - scale);
                    store(row + r, phi);
                    sum += phi;
                }
                sums.key_sum[f] = total(sum);
            }
            multiply(count, p.padded_value, rows, rows_of(panel, kBlock), b.value, p.padded_value,
                     sums.key_value + first * p.padded_value, p.padded_value, false);
        }
    }
}

// Adds features [first, last) of sums over other keys at the same scale.
inline void add_sums(const Problem &p, const Sums &to, const Sums &from, int64_t first,
                     int64_t last) {
    for (int64_t i = first * p.padded_value; i < last * p.padded_value; ++i) {
        to.key_value[i] += from.key_value[i];
    }
    for (int64_t f = first; f < last; ++f) to.key_sum[f] += from.key_sum[f];
}

inline void copy_sums(const Problem &p, const Sums &to, const Sums &from, int64_t first,
                      int64_t last) {
    std::memcpy(to.key_value + first * p.padded_value, from.key_value + first * p.padded_value,
                sizeof(float) * static_cast<size_t>((last - first) * p.padded_value));
    std::memcpy(to.key_sum + first, from.key_sum + first,
                sizeof(float) * static_cast<size_t>(last - first));
}

inline void clear_sums(const Problem &p, const Sums &sums, int64_t first, int64_t last) {
    for (int64_t i = first * p.padded_value; i < last * p.padded_value; ++i) sums.key_value[i] = 0;
    for (int64_t f = first; f < last; ++f) sums.key_sum[f] = 0;
}

// For features [first, last): brings all key blocks to the scale of the largest exponents, and adds
// up what all rows of each block of queries reach.
inline void far_sums(const Problem &p, const FarUnit &unit, int64_t first, int64_t last,
                     const Sums &running) {
    const FarGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    for (int64_t f = first; f < last; ++f) unit.log_scale[f] = -kInfinity;
    for (int64_t c = 0; c < grid.key_blocks; ++c) {
        if (!grid.needed(c)) continue;
        const Sums sums = unit.sums_of(p, c);
        for (int64_t f = first; f < last; ++f) {
            unit.log_scale[f] = larger(unit.log_scale[f], sums.log_scale[f]);
        }
    }
    for (int64_t c = 0; c < grid.key_blocks; ++c) {
        if (!grid.needed(c)) continue;
        const Sums sums = unit.sums_of(p, c);
        float *features = unit.features_of(p, c);
        for (int64_t f = first; f < last; ++f) {
            const float factor = decay(sums.log_scale[f], unit.log_scale[f]);
            if (factor == 1) continue;
            sums.scale_row(p, f, factor);
            sums.key_sum[f] *= factor;
            float *row = features + f * kBlock;
            for (int64_t r = 0; r < grid.key_rows(c); r += kWidth) {
                store(row + r, load(row + r) * factor);
            }
        }
    }
    clear_sums(p, running, first, last);
    int64_t c = grid.key_blocks;
    for (int64_t b = grid.query_blocks - 1; b >= 0; --b) {
        while (c > grid.full(b)) add_sums(p, running, unit.sums_of(p, --c), first, last);
        copy_sums(p, unit.reached_by(p, b), running, first, last);
    }
    clear_sums(p, running, first, last);
    c = 0;
    for (int64_t b = 0; b < grid.query_blocks; ++b) {
        while (c < smaller(grid.past(b), grid.key_blocks)) {
            add_sums(p, running, unit.sums_of(p, c++), first, last);
        }
        if (c > 0) add_sums(p, unit.reached_by(p, b), running, first, last);
    }
}

// Zeros in pairs (keys, kBlock queries) outside a band, and up to whole vectors.
inline void clear_outside(float *pairs, int64_t keys, int64_t rows, Band band) {
    const int64_t used = round_up(rows, kWidth);
    for (int64_t t = 0; t < keys; ++t) {
        float *row = pairs + t * kBlock;
        const int64_t from = smaller(used, larger<int64_t>(0, t - band.high));
        const int64_t to = larger(from, smaller(rows, t - band.low + 1));
        for (int64_t s = 0; s < from; ++s) row[s] = 0;
        for (int64_t s = to; s < used; ++s) row[s] = 0;
    }
}

// The most blocks of keys that a block of queries can reach in part.
constexpr int64_t kPartial = 4;

struct FarQueryBuffers {
    QueryBuffers q;
    float *keep, *value, *pairs;
    Sums running;

    FarQueryBuffers(Arena &arena, const Problem &p)
        : q(arena, p),
          keep(arena.take(kBlock)),
          value(arena.take(kPartial * kBlock * p.padded_value)),
          pairs(arena.take(kBlock * kBlock)),
          running(arena.take(Sums::size(p)), p) {}
};

// The values of a block of keys; those of keys that take no part are zero.
inline void far_values(const Problem &p, const FarUnit &unit, int64_t c, float *keep, float *to) {
    const int64_t start = unit.grid.key_begin(c), rows = unit.grid.key_rows(c);
    const uint8_t *mask = p.mask(unit.head);
    for (int64_t r = 0; r < rows; ++r) {
        const bool there = start + r >= unit.grid.span.first;
        keep[r] = there && (!mask || mask[start + r]) ? 1.0f : 0.0f;
    }
    load_values(p, p.key_rows(p.call.value, unit.head), start, rows, keep, to);
}

// The query blocks [begin, end): features, exact pairs, and the quotient.
inline void far_queries(const Problem &p, const FarUnit &unit, int64_t begin, int64_t end,
                        FarQueryBuffers &b) {
    const FarGrid &grid = unit.grid;
    QueryBuffers &q = b.q;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t start = grid.query_begin(block), rows = grid.query_rows(block);
        const bool reaches = grid.reaches(block);
        int64_t partial = 0;
        grid.for_partial_keys(block, [&](int64_t c, Band) {
            far_values(p, unit, c, b.keep, b.value + partial++ * kBlock * p.padded_value);
        });
        const Sums sums = unit.reached_by(p, block);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            q.block.load_queries(p, p.query_rows(p.call.query, unit.head, group), start, rows);
            if (reaches) {
                project(p, p.weights_of(unit.head), q.block, p.query_inner, 0, p.features,
                        q.features);
                query_features(p, q.features, rows, sums.log_scale, sums.key_sum, q.scale,
                               q.inverse);
                multiply(rows, p.padded_value, p.features, columns_of(q.features, kBlock),
                         sums.key_value, p.padded_value, q.out, p.padded_value, false);
            } else {
                for (int64_t r = 0; r < kBlock; ++r) q.inverse[r] = q.scale[r] = 0;
                for (int64_t i = 0; i < rows * p.padded_value; ++i) q.out[i] = 0;
            }
            partial = 0;
            grid.for_partial_keys(block, [&](int64_t c, Band band) {
                const int64_t keys = grid.key_rows(c);
                multiply_band(keys, rows, p.features, columns_of(unit.features_of(p, c), kBlock),
                              q.features, kBlock, b.pairs, kBlock, band);
                clear_outside(b.pairs, keys, rows, band);
                for (int64_t t = 0; t < keys; ++t) {
                    for (int64_t r = 0; r < rows; r += kWidth) {
                        store(q.inverse + r, load(q.inverse + r) + load(b.pairs + t * kBlock + r));
                    }
                }
                multiply(rows, p.padded_value, keys, columns_of(b.pairs, kBlock),
                         b.value + partial++ * kBlock * p.padded_value, p.padded_value, q.out,
                         p.padded_value, true, by_row(band));
            });
            exact_sums(p, unit.head, grid.span, start, q.block, q.near);
            add_exact(p, rows, q.near, q.out, q.scale, q.inverse);
            for (int64_t r = 0; r < rows; ++r) q.inverse[r] = inverse_of(q.inverse[r]);
            finish_rows(p, unit.head, group, start, rows, q.out, q.scale, q.inverse);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
