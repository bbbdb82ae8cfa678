// Bidirectional attention with a window: what lies outside it, through features.
#pragma once

#include "windowed_sums.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The memory of one sequence of a head.
struct WindowUnit {
    int64_t head;
    WindowGrid grid;
    float *features = nullptr;   // (key blocks, features, kBlock), at the scales of their sums
    SegmentSums keys = {};       // over keys
    float *log_scale = nullptr;  // (features): of all keys
    // The backward pass: (query blocks, groups, features, kBlock), (query blocks, groups, kBlock), and
    // the gradients of what blocks of queries read.
    float *query_features = nullptr, *delta = nullptr;
    SegmentSums grads = {};

    static int64_t block_size(const Problem &p) { return p.features * kBlock; }

    void place(Arena &arena, const Problem &p, bool backward) {
        if (!grid.reaches()) return;
        features = arena.take(grid.key_blocks * block_size(p));
        keys.place(arena, p, grid.keys());
        log_scale = arena.take(p.features);
        if (!backward) return;
        query_features = arena.take(grid.query_blocks * p.call.groups * block_size(p));
        delta = arena.take(grid.query_blocks * p.call.groups * kBlock);
        grads.place(arena, p, grid.queries());
    }

    float *features_of(const Problem &p, int64_t c) const { return features + c * block_size(p); }
    float *query_features_of(const Problem &p, int64_t b, int64_t group) const {
        return query_features + (b * p.call.groups + group) * block_size(p);
    }
    float *delta_of(const Problem &p, int64_t b, int64_t group) const {
        return delta + (b * p.call.groups + group) * kBlock;
    }
};

struct WindowKeyBuffers : KeyBlock {
    using KeyBlock::KeyBlock;

    float *log_scale = arena.take(p.features), *decays = arena.take(p.features);
};

// Features and sums of the segments [begin, end) of keys, each block at the largest exponents up to
// it.
inline void windowed_keys(const Problem &p, const WindowUnit &unit, int64_t begin, int64_t end,
                          WindowKeyBuffers &b) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    for (int64_t f = 0; f < p.features; ++f) b.log_scale[f] = -kInfinity;
    for (int64_t segment = begin; segment < end; ++segment) {
        const Sums whole = unit.keys.from(segment);
        whole.clear();
        for (int64_t c = grid.keys().first(segment); c < grid.keys().last(segment); ++c) {
            if (!grid.needed(c)) continue;
            const int64_t rows = grid.key_rows(c);
            b.load_keys(unit.head, grid.key_begin(c), rows, grid.span.first);
            float *features = unit.features_of(p, c);
            const Sums sums = unit.keys.of(c);
            for (int64_t first = 0; first < p.features; first += kPanel) {
                const int64_t count = smaller(kPanel, p.features - first);
                float *panel = features + first * kBlock;
                project(p, unit.head, b.block, first, count, panel);
                for (int64_t f = first; f < first + count; ++f) {
                    float *row = features + f * kBlock;
                    b.log_scale[f] = largest(peaks(row, rows, b.log_scale[f]));
                    sums.key_sum[f] = exponentiate(row, rows, b.log_scale[f]);
                    b.decays[f] = decay(whole.log_scale[f], b.log_scale[f]);
                    sums.log_scale[f] = whole.log_scale[f] = b.log_scale[f];
                }
                sum_rows(p.padded_value, count, rows, panel, b.value, sums.row(first), false);
                add_sums(whole, whole, b.decays, &sums, first, first + count);
            }
        }
    }
}

// For features [first, last): the largest exponents of all keys, what brings each block there, and
// the sums over segments added up.
inline void windowed_sums(const WindowUnit &unit, int64_t first, int64_t last, bool both) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const int64_t segments = grid.keys().count();
    for (int64_t f = first; f < last; ++f) unit.log_scale[f] = -kInfinity;
    for (int64_t s = 0; s < segments; ++s) {
        const float *scale = unit.keys.from(s).log_scale;
        for (int64_t f = first; f < last; ++f) {
            unit.log_scale[f] = larger(unit.log_scale[f], scale[f]);
        }
    }
    const auto to_factors = [&](float *scale) {
        for (int64_t f = first; f < last; ++f) scale[f] = decay(scale[f], unit.log_scale[f]);
    };
    for (int64_t s = 0; s < segments; ++s) to_factors(unit.keys.from(s).log_scale);
    for (int64_t c = 0; c < grid.key_blocks; ++c) {
        if (grid.needed(c)) to_factors(unit.keys.of(c).log_scale);
    }
    unit.keys.add_up(both, first, last);
}

// The blocks of keys that a block of queries reaches in part.
class PartialKeys : Buffers {
public:
    using Buffers::Buffers;

    // The features of a block of keys, at the scale of all; a few are kept.
    const float *features(const WindowUnit &unit, int64_t c) {
        int oldest = 0;
        for (int i = 0; i < kPartial; ++i) {
            if (blocks_[i] == c) return place(i);
            if (used_[i] < used_[oldest]) oldest = i;
        }
        blocks_[oldest] = c;
        float *to = place(oldest);
        const float *from = unit.features_of(p, c), *factors = unit.keys.of(c).log_scale;
        const int64_t rows = unit.grid.key_rows(c);
        for (int64_t f = 0; f < p.features; ++f) {
            for (int64_t r = f * kBlock; r < f * kBlock + rows; r += kWidth) {
                store(to + r, load(from + r) * splat(factors[f]));
            }
        }
        return to;
    }

    // The values that a block of queries meets; those of keys that take no part are zero.
    void load_values(const WindowUnit &unit, int64_t block) const {
        const Rows from = p.rows(p.call.value, unit.head);
        unit.grid.for_partial_keys(block, [&](int64_t i, int64_t c, Band) {
            const int64_t start = unit.grid.key_begin(c), rows = unit.grid.key_rows(c);
            keep_keys(p.mask(unit.head), start, rows, keep_, unit.grid.span.first);
            PERFORMERS_ISA::load_values(p, from, start, rows, keep_, value_ + i * value_size());
        });
    }

    // Of the i-th of those blocks.
    const float *values(int64_t i) const { return value_ + i * value_size(); }

private:
    int64_t value_size() const { return kBlock * p.padded_value; }

    float *place(int i) {
        used_[i] = ++time_;
        return features_ + i * p.features * kBlock;
    }

    float *features_ = arena.take(kPartial * p.features * kBlock);
    float *value_ = arena.take(kPartial * value_size()), *keep_ = arena.take(kBlock);
    int64_t blocks_[kPartial] = {-1, -1, -1, -1}, used_[kPartial] = {}, time_ = 0;
};

// What the segment of queries reads that is next.
inline void read_windowed_keys(const WindowUnit &unit, int64_t segment, SegmentReader &reader) {
    const WindowGrid &grid = unit.grid;
    reader.read(
        unit.keys, grid.queries().first(segment), grid.queries().last(segment),
        smaller(grid.key_blocks, (segment + 1) * kSegment + grid.ahead),
        [&](int64_t b) { return grid.lower(b); }, [&](int64_t b) { return grid.full(b); });
}

struct WindowQueryBuffers : Buffers {
    using Buffers::Buffers;

    QueryBuffers q{arena, p};
    float *pairs = arena.take(kBlock * kBlock);
    SegmentReader reader{arena, p};
    PartialKeys partial{arena, p};
};

// The segments [begin, end) of queries: features, exact pairs, and the quotient.
inline void windowed_queries(const Problem &p, const WindowUnit &unit, int64_t begin, int64_t end,
                             WindowQueryBuffers &b) {
    const WindowGrid &grid = unit.grid;
    QueryBuffers &q = b.q;
    const int64_t first = grid.queries().first(begin), last = grid.queries().last(end - 1);
    if (grid.reaches()) b.reader.start(unit.keys, grid.lower(first));
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = grid.query_begin(block), rows = grid.query_rows(block);
        if (grid.reaches() && block % kSegment == 0) {
            read_windowed_keys(unit, block / kSegment, b.reader);
        }
        b.partial.load_values(unit, block);
        Sums sums = b.reader.of(block % kSegment);
        sums.log_scale = unit.log_scale;
        for (int64_t group = 0; group < p.call.groups; ++group) {
            q.block.load_queries(p.rows(p.call.query, unit.head, group), start, rows);
            if (grid.reaches(block)) {
                read_sums(p, unit.head, sums, q);
            } else {
                q.clear();
            }
            grid.for_partial_keys(block, [&](int64_t i, int64_t c, Band band) {
                const int64_t keys = grid.key_rows(c);
                feature_pairs(p, keys, rows, b.partial.features(unit, c), q.features, band, b.pairs);
                add_up(b.pairs, keys, rows, q.normaliser);
                combine(p.padded_value, rows, keys, b.pairs, b.partial.values(i), q.out, true,
                        by_row(band));
            });
            exact_sums(p, unit.head, grid.span, start, q);
            add_exact(p, q);
            finish_rows(p, unit.head, group, start, q);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
