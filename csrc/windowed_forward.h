// Bidirectional attention with a window: what lies outside it, through features.
//
// A block of queries reads the sums over the keys that lie before the windows of all its rows and
// after them, and meets one by one the few blocks of keys that only some of its rows reach. So the
// sums over each block of keys are kept, and added up from both ends: the features of a key are
// computed once. All stand at one scale, the largest exponent of each feature over all keys. That
// loses nothing, as the key it belongs to is one that a row meets: among its features' sums, or
// exactly, where its weight bounds from below what its features could have hidden.
//
// The sums of a block are as large as its features, and both together too large for the caches, so
// few passes go over them. The sums over a segment, a few blocks, are added up on the way;
// only those of segments are added up over all keys, and what lies between when the queries of a
// segment are about to read it.
#pragma once

#include "exact_gradients.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The most blocks of keys that a block of queries can reach in part.
constexpr int64_t kPartial = 4;

// Blocks in a segment: what all of them read has a place in the second cache.
constexpr int64_t kSegment = 8;

// Consecutive blocks in segments. The first segment is `shift` blocks shorter than the others.
struct Segments {
    int64_t blocks, shift;

    int64_t count() const { return (blocks + shift + kSegment - 1) / kSegment; }
    int64_t of(int64_t block) const { return (block + shift) / kSegment; }
    int64_t first(int64_t segment) const {
        return larger<int64_t>(0, smaller(blocks, segment * kSegment - shift));
    }
    int64_t last(int64_t segment) const { return first(segment + 1); }
};

// How the blocks of keys and of queries of a sequence lie to each other. Blocks of keys begin where
// windows of blocks of queries do.
struct WindowGrid {
    Span span;
    int64_t window;
    int64_t origin;  // row where key block 0 begins, at or before the first key
    int64_t key_blocks, query_blocks;
    int64_t behind, ahead;  // blocks by which past(b) is less than b, and full(b) more than b + 1

    WindowGrid(const Problem &p, const Span &span)
        : span(span),
          window(p.window),
          origin(span.first - p.window % kBlock),
          key_blocks((span.last - origin + kBlock - 1) / kBlock),
          query_blocks((span.end - span.begin + kBlock - 1) / kBlock),
          behind(window / kBlock),
          ahead((span.begin + window - origin + kBlock - 1) / kBlock) {}

    // Segments of queries, and of keys: where the keys begin that all rows of a segment of queries
    // reach above their windows, a segment of keys begins.
    Segments queries() const { return {query_blocks, 0}; }
    Segments keys() const { return {key_blocks, round_up(ahead, kSegment) - ahead}; }
    // Likewise for what keys read of queries.
    Segments reading_keys() const { return {key_blocks, behind % kSegment}; }

    int64_t query_begin(int64_t b) const { return span.begin + b * kBlock; }
    int64_t query_rows(int64_t b) const { return smaller(kBlock, span.end - query_begin(b)); }
    int64_t key_begin(int64_t c) const { return origin + c * kBlock; }
    int64_t key_rows(int64_t c) const { return smaller(kBlock, span.last - key_begin(c)); }

    // The block of keys that some queries of block b reach over the lower end of their windows; all
    // reach those before it.
    int64_t past(int64_t b) const { return b - behind; }
    // The blocks of keys from future(b) to full(b) are those that some queries reach over the upper
    // end; all reach those from full(b) on.
    int64_t future(int64_t b) const {
        return smaller(key_blocks, (query_begin(b) + window + 1 - origin) / kBlock);
    }
    int64_t full(int64_t b) const {
        const int64_t end = query_begin(b) + window + query_rows(b) - origin;
        return smaller(key_blocks, (end + kBlock - 1) / kBlock);
    }

    // All rows of block b reach the blocks of keys before lower(b) and from full(b) on; all keys of
    // block c are reached by the blocks of queries before key_lower(c) and from key_upper(c) on.
    int64_t lower(int64_t b) const { return larger<int64_t>(0, smaller(past(b), key_blocks)); }
    int64_t key_lower(int64_t c) const {
        int64_t b = larger<int64_t>(0, smaller(query_blocks, c - ahead));
        while (b < query_blocks && full(b) <= c) ++b;
        return b;
    }
    int64_t key_upper(int64_t c) const { return smaller(query_blocks, c + behind + 1); }

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
        const int64_t before_it = c + behind;
        if (before_it < query_blocks) visit(before_it, before());
        const int64_t about = (key_begin(c) - window - 1 - span.begin) / kBlock - 1;
        for (int64_t b = larger<int64_t>(0, about); b < query_blocks && future(b) <= c; ++b) {
            if (c < full(b)) visit(b, after(b, c));
        }
    }
};

// Sums over each of many blocks, and over all blocks before and from each segment on.
struct SegmentSums {
    float *blocks = nullptr;                     // (blocks, Sums)
    float *before = nullptr, *from = nullptr;  // (segments, Sums)

    void place(Arena &arena, const Problem &p, const Segments &segments) {
        blocks = arena.take(segments.blocks * Sums::size(p));
        before = arena.take(segments.count() * Sums::size(p));
        from = arena.take(segments.count() * Sums::size(p));
    }

    Sums of(const Problem &p, int64_t block) const {
        return Sums(blocks + block * Sums::size(p), p);
    }
    Sums before_segment(const Problem &p, int64_t segment) const {
        return Sums(before + segment * Sums::size(p), p);
    }
    // At first of the segment alone.
    Sums from_segment(const Problem &p, int64_t segment) const {
        return Sums(from + segment * Sums::size(p), p);
    }
};

// The memory of one sequence of a head.
struct WindowUnit {
    int64_t head;
    WindowGrid grid;
    float *features = nullptr;   // (key blocks, features, kBlock), at the scales of their sums
    SegmentSums keys = {};       // over keys; their log scales become factors that bring them to
                                 // those of all keys
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

struct WindowKeyBuffers : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    float *value = arena.take(kBlock * p.padded_value), *keep = arena.take(kBlock);
    float *log_scale = arena.take(p.features);
};

// Adds features [first, last) of the sums over a block to those of its segment, whose scales are
// raised to those of the block.
inline void add_block(const Problem &p, const Sums &to, const Sums &from, int64_t first,
                      int64_t last) {
    for (int64_t f = first; f < last; ++f) {
        const float factor = decay(to.log_scale[f], from.log_scale[f]);
        float *row = to.key_value + f * p.padded_value;
        const float *more = from.key_value + f * p.padded_value;
        for (int64_t c = 0; c < p.padded_value; c += kWidth) {
            store(row + c, load(row + c) * splat(factor) + load(more + c));
        }
        to.key_sum[f] = to.key_sum[f] * factor + from.key_sum[f];
        to.log_scale[f] = from.log_scale[f];
    }
}

// Features and sums of the segments [begin, end) of keys, each block at the largest exponents up to
// it.
inline void windowed_keys(const Problem &p, const WindowUnit &unit, int64_t begin, int64_t end,
                     WindowKeyBuffers &b) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    for (int64_t f = 0; f < p.features; ++f) b.log_scale[f] = -kInfinity;
    for (int64_t segment = begin; segment < end; ++segment) {
        const Sums whole = unit.keys.from_segment(p, segment);
        whole.clear(p);
        for (int64_t c = grid.keys().first(segment); c < grid.keys().last(segment); ++c) {
            if (!grid.needed(c)) continue;
            const int64_t start = grid.key_begin(c), rows = grid.key_rows(c);
            load_keys_and_values(p, unit.head, start, rows, b.block, b.keep, b.value,
                                 grid.span.first);
            float *features = unit.features_of(p, c);
            const Sums sums = unit.keys.of(p, c);
            for (int64_t first = 0; first < p.features; first += kPanel) {
                const int64_t count = smaller(kPanel, p.features - first);
                float *panel = features + first * kBlock;
                project(p, p.weights_of(unit.head), b.block, p.key_inner, first, count, panel);
                for (int64_t f = first; f < first + count; ++f) {
                    float *row = features + f * kBlock;
                    b.log_scale[f] = largest(peaks(row, rows, b.log_scale[f]));
                    sums.log_scale[f] = b.log_scale[f];
                    sums.key_sum[f] = exponentiate(row, rows, b.log_scale[f]);
                }
                multiply(count, p.padded_value, rows, rows_of(panel, kBlock), b.value,
                         p.padded_value, sums.key_value + first * p.padded_value, p.padded_value,
                         false);
                add_block(p, whole, sums, first, first + count);
            }
        }
    }
}

// to = from * factors + more, for features [first, last); null factors are one, and a null `more`
// zero.
inline void add_sums(const Problem &p, const Sums &to, const Sums &from, const float *factors,
                     const Sums *more, int64_t first, int64_t last) {
    for (int64_t f = first; f < last; ++f) {
        const float factor = factors ? factors[f] : 1.0f;
        const int64_t row = f * p.padded_value;
        for (int64_t c = row; c < row + p.padded_value; c += kWidth) {
            const Vector sum = load(from.key_value + c) * splat(factor);
            store(to.key_value + c, more ? sum + load(more->key_value + c) : sum);
        }
        const float sum = from.key_sum[f] * factor;
        to.key_sum[f] = more ? sum + more->key_sum[f] : sum;
    }
}

inline void clear_sums(const Problem &p, const Sums &sums, int64_t first, int64_t last) {
    for (int64_t i = first * p.padded_value; i < last * p.padded_value; ++i) sums.key_value[i] = 0;
    for (int64_t f = first; f < last; ++f) sums.key_sum[f] = 0;
}

// For features [first, last): adds up the sums over segments, multiplied with their log scales if
// these are `factors`, from both ends. Those before a segment are needed only where several tasks
// follow.
inline void add_segments(const Problem &p, const SegmentSums &sums, int64_t segments, bool factors,
                         bool both, int64_t first, int64_t last) {
    const auto factors_of = [&](const Sums &s) { return factors ? s.log_scale : nullptr; };
    for (int64_t s = 0; both && s < segments; ++s) {
        const Sums before = sums.before_segment(p, s);
        if (s == 0) {
            clear_sums(p, before, first, last);
        } else {
            const Sums previous = sums.before_segment(p, s - 1);
            const Sums more = sums.from_segment(p, s - 1);
            add_sums(p, before, more, factors_of(more), &previous, first, last);
        }
    }
    for (int64_t s = segments - 1; s >= 0; --s) {
        const Sums from = sums.from_segment(p, s);
        if (s == segments - 1) {
            add_sums(p, from, from, factors_of(from), nullptr, first, last);
        } else {
            const Sums next = sums.from_segment(p, s + 1);
            add_sums(p, from, from, factors_of(from), &next, first, last);
        }
    }
}

// For features [first, last): the largest exponents of all keys, what brings each block there, and
// the sums over segments added up.
inline void windowed_sums(const Problem &p, const WindowUnit &unit, int64_t first, int64_t last,
                     bool both) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const int64_t segments = grid.keys().count();
    for (int64_t f = first; f < last; ++f) unit.log_scale[f] = -kInfinity;
    for (int64_t s = 0; s < segments; ++s) {
        const float *scale = unit.keys.from_segment(p, s).log_scale;
        for (int64_t f = first; f < last; ++f) {
            unit.log_scale[f] = larger(unit.log_scale[f], scale[f]);
        }
    }
    const auto to_factors = [&](float *scale) {
        for (int64_t f = first; f < last; ++f) scale[f] = decay(scale[f], unit.log_scale[f]);
    };
    for (int64_t s = 0; s < segments; ++s) to_factors(unit.keys.from_segment(p, s).log_scale);
    for (int64_t c = 0; c < grid.key_blocks; ++c) {
        if (grid.needed(c)) to_factors(unit.keys.of(p, c).log_scale);
    }
    add_segments(p, unit.keys, segments, true, both, first, last);
}

// What the blocks of a segment read of the sums over other blocks: over those before `lower` of
// each and from `upper` on.
class SegmentReader {
public:
    SegmentReader(Arena &arena, const Problem &p)
        : running_(arena.take(Sums::size(p)), p), memory_(arena.take(kSegment * Sums::size(p))) {}

    // For reading segments in order, from one on whose first block has this `lower`.
    void start(const Problem &p, const SegmentSums &sums, const Segments &segments, bool factors,
               int64_t lower) {
        if (lower == 0) {
            next_ = 0;
            return clear_sums(p, running_, 0, p.features);
        }
        // There is no segment where all blocks end: the last one, and the rest block by block.
        const int64_t segment = smaller(segments.of(lower), segments.count() - 1);
        next_ = segments.first(segment);
        add_sums(p, running_, sums.before_segment(p, segment), nullptr, nullptr, 0, p.features);
        for (; next_ < lower; ++next_) {
            const Sums more = sums.of(p, next_);
            add_sums(p, running_, more, factors ? more.log_scale : nullptr, &running_, 0,
                     p.features);
        }
    }

    // Reads for `count` blocks, with the lower and upper ends of each. `bound`, at or beyond all
    // upper ends, is where a segment begins, or all blocks end.
    void read(const Problem &p, const SegmentSums &sums, const Segments &segments, bool factors,
              int64_t count, const int64_t *lower, const int64_t *upper, int64_t bound) {
        for (int64_t first = 0; first < p.features; first += kPanel) {
            const int64_t last = smaller(p.features, first + kPanel);
            const auto add = [&](const Sums &to, int64_t block, const Sums *more) {
                const Sums of = sums.of(p, block);
                add_sums(p, to, of, factors ? of.log_scale : nullptr, more, first, last);
            };
            Sums above = of(p, count - 1);
            if (bound < segments.blocks) {
                above = sums.from_segment(p, segments.of(bound));
            } else {
                clear_sums(p, above, first, last);
            }
            for (int64_t i = count - 1, block = bound; i >= 0; --i) {
                const Sums to = of(p, i);
                if (block == upper[i] && to.key_value != above.key_value) {
                    add_sums(p, to, above, nullptr, nullptr, first, last);
                }
                for (; block > upper[i]; above = to) add(to, --block, &above);
                above = to;
            }
            int64_t block = next_;
            for (int64_t i = 0; i < count; ++i) {
                while (block < lower[i]) add(running_, block++, &running_);
                const Sums to = of(p, i);
                if (block > 0) add_sums(p, to, running_, nullptr, &to, first, last);
            }
        }
        next_ = larger(next_, lower[count - 1]);
    }

    // What block i of the segment reads.
    Sums of(const Problem &p, int64_t i) const { return Sums(memory_ + i * Sums::size(p), p); }

private:
    Sums running_;  // over the blocks before next_
    float *memory_;
    int64_t next_ = 0;
};

// The features of a few blocks of keys, at the scale of all.
class WindowFeatures {
public:
    WindowFeatures(Arena &arena, const Problem &p)
        : memory_(arena.take(kPlaces * p.features * kBlock)) {}

    const float *of(const Problem &p, const WindowUnit &unit, int64_t c) {
        int oldest = 0;
        for (int i = 0; i < kPlaces; ++i) {
            if (blocks_[i] == c) return place(p, i);
            if (used_[i] < used_[oldest]) oldest = i;
        }
        blocks_[oldest] = c;
        float *to = place(p, oldest);
        const float *from = unit.features_of(p, c), *factors = unit.keys.of(p, c).log_scale;
        const int64_t rows = unit.grid.key_rows(c);
        for (int64_t f = 0; f < p.features; ++f) {
            for (int64_t r = f * kBlock; r < f * kBlock + rows; r += kWidth) {
                store(to + r, load(from + r) * splat(factors[f]));
            }
        }
        return to;
    }

private:
    static constexpr int kPlaces = kPartial;

    float *place(const Problem &p, int i) {
        used_[i] = ++time_;
        return memory_ + i * p.features * kBlock;
    }

    float *memory_;
    int64_t blocks_[kPlaces] = {-1, -1, -1, -1}, used_[kPlaces] = {}, time_ = 0;
};

// What the segment of queries reads that is next.
inline void read_windowed_keys(const Problem &p, const WindowUnit &unit, int64_t segment,
                          SegmentReader &reader) {
    const WindowGrid &grid = unit.grid;
    const int64_t first = grid.queries().first(segment), last = grid.queries().last(segment);
    int64_t lower[kSegment], upper[kSegment];
    for (int64_t b = first; b < last; ++b) {
        lower[b - first] = grid.lower(b);
        upper[b - first] = grid.full(b);
    }
    const int64_t bound = smaller(grid.key_blocks, (segment + 1) * kSegment + grid.ahead);
    reader.read(p, unit.keys, grid.keys(), true, last - first, lower, upper, bound);
}

struct WindowQueryBuffers : Buffers {
    using Buffers::Buffers;

    QueryBuffers q{arena, p};
    float *keep = arena.take(kBlock), *value = arena.take(kPartial * kBlock * p.padded_value);
    float *pairs = arena.take(kBlock * kBlock);
    SegmentReader reader{arena, p};
    WindowFeatures features{arena, p};
};

// The values of a block of keys; those of keys that take no part are zero.
inline void windowed_values(const Problem &p, const WindowUnit &unit, int64_t c, float *keep, float *to) {
    const int64_t start = unit.grid.key_begin(c), rows = unit.grid.key_rows(c);
    const uint8_t *mask = p.mask(unit.head);
    for (int64_t r = 0; r < rows; ++r) {
        const bool there = start + r >= unit.grid.span.first;
        keep[r] = there && (!mask || mask[start + r]) ? 1.0f : 0.0f;
    }
    load_values(p, p.key_rows(p.call.value, unit.head), start, rows, keep, to);
}

// The segments [begin, end) of queries: features, exact pairs, and the quotient.
inline void windowed_queries(const Problem &p, const WindowUnit &unit, int64_t begin, int64_t end,
                        WindowQueryBuffers &b) {
    const WindowGrid &grid = unit.grid;
    QueryBuffers &q = b.q;
    const int64_t first = grid.queries().first(begin), last = grid.queries().last(end - 1);
    if (grid.reaches()) b.reader.start(p, unit.keys, grid.keys(), true, grid.lower(first));
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = grid.query_begin(block), rows = grid.query_rows(block);
        const bool reaches = grid.reaches(block);
        if (grid.reaches() && block % kSegment == 0) {
            read_windowed_keys(p, unit, block / kSegment, b.reader);
        }
        int64_t partial = 0;
        grid.for_partial_keys(block, [&](int64_t c, Band) {
            windowed_values(p, unit, c, b.keep, b.value + partial++ * kBlock * p.padded_value);
        });
        const Sums sums = b.reader.of(p, block % kSegment);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            q.block.load_queries(p, p.query_rows(p.call.query, unit.head, group), start, rows);
            if (reaches) {
                project(p, p.weights_of(unit.head), q.block, p.query_inner, 0, p.features,
                        q.features);
                query_features(p, q.features, rows, unit.log_scale, sums.key_sum, q.scale,
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
                multiply_band(keys, rows, p.features,
                              columns_of(b.features.of(p, unit, c), kBlock), q.features, kBlock,
                              b.pairs, kBlock, band);
                clear_outside(b.pairs, keys, rows, band);
                add_up(b.pairs, keys, rows, q.inverse);
                multiply(rows, p.padded_value, keys, columns_of(b.pairs, kBlock),
                         b.value + partial++ * kBlock * p.padded_value, p.padded_value, q.out,
                         p.padded_value, true, by_row(band));
            });
            exact_sums(p, unit.head, grid.span, start, q.block, q.exact);
            add_exact(p, rows, q.exact, q.out, q.scale, q.inverse);
            for (int64_t r = 0; r < rows; ++r) q.inverse[r] = inverse_of(q.inverse[r]);
            finish_rows(p, unit.head, group, start, rows, q.out, q.scale, q.inverse);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
