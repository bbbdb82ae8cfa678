// Blocks of keys and queries of bidirectional attention with a window, and sums over many blocks.
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
    // The row where key block 0 begins, at or before the first key.
    int64_t origin = span.first - window % kBlock;
    int64_t key_blocks = (span.last - origin + kBlock - 1) / kBlock;
    int64_t query_blocks = (span.end - span.begin + kBlock - 1) / kBlock;
    // Blocks by which past(b) is less than b, and full(b) more than b + 1.
    int64_t behind = window / kBlock;
    int64_t ahead = (span.begin + window - origin + kBlock - 1) / kBlock;

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

    // Calls visit(i, c, band) for the blocks of keys that some rows of block b reach; i counts them.
    template <typename Visit>
    void for_partial_keys(int64_t b, Visit &&visit) const {
        int64_t i = 0;
        if (past(b) >= 0 && past(b) < key_blocks) visit(i++, past(b), before());
        for (int64_t c = future(b); c < full(b); ++c) visit(i++, c, after(b, c));
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

// For features [first, last): to = from * factors + more; null factors are one, and a null `more` zero.
inline void add_sums(const Sums &to, const Sums &from, const float *factors, const Sums *more,
                     int64_t first, int64_t last) {
    const int64_t width = to.p->padded_value;
    for (int64_t f = first; f < last; ++f) {
        const float factor = factors ? factors[f] : 1.0f;
        for (int64_t c = f * width; c < (f + 1) * width; c += kWidth) {
            const Vector sum = load(from.key_value + c) * splat(factor);
            store(to.key_value + c, more ? sum + load(more->key_value + c) : sum);
        }
        const float sum = from.key_sum[f] * factor;
        to.key_sum[f] = more ? sum + more->key_sum[f] : sum;
    }
}

inline void clear_sums(const Sums &sums, int64_t first, int64_t last) {
    for (float *x = sums.row(first); x < sums.row(last); ++x) *x = 0;
    for (int64_t f = first; f < last; ++f) sums.key_sum[f] = 0;
}

// Sums over each of many blocks, and over all blocks before and from each segment on. In the place of
// log scales are factors, in the end, that bring sums over a block or segment to the scale of all.
class SegmentSums {
public:
    Segments segments = {};

    void place(Arena &arena, const Problem &p, const Segments &of) {
        p_ = &p;
        segments = of;
        blocks_ = arena.take(segments.blocks * Sums::size(p));
        before_ = arena.take(segments.count() * Sums::size(p));
        from_ = arena.take(segments.count() * Sums::size(p));
    }

    Sums of(int64_t block) const { return at(blocks_, block); }
    Sums before(int64_t segment) const { return at(before_, segment); }
    // At first of the segment alone.
    Sums from(int64_t segment) const { return at(from_, segment); }

    // For features [first, last): adds up the sums over segments from both ends. Those before a segment
    // are needed only where several tasks follow.
    void add_up(bool both, int64_t first, int64_t last) const {
        if (both) clear_sums(before(0), first, last);
        for (int64_t s = 1; both && s < segments.count(); ++s) {
            const Sums previous = before(s - 1), more = from(s - 1);
            add_sums(before(s), more, more.log_scale, &previous, first, last);
        }
        for (int64_t s = segments.count() - 1; s >= 0; --s) {
            const bool has_next = s + 1 < segments.count();
            const Sums sums = from(s), next = from(has_next ? s + 1 : s);
            add_sums(sums, sums, sums.log_scale, has_next ? &next : nullptr, first, last);
        }
    }

private:
    Sums at(float *sums, int64_t i) const { return Sums(*p_, sums + i * Sums::size(*p_)); }

    const Problem *p_ = nullptr;
    float *blocks_ = nullptr, *before_ = nullptr, *from_ = nullptr;
};

// What the blocks of a segment read of the sums over other blocks: over those before `lower` of
// each and from `upper` on.
class SegmentReader : Buffers {
public:
    using Buffers::Buffers;

    // For reading segments in order, from one on whose first block has this `lower`.
    void start(const SegmentSums &sums, int64_t lower) {
        next_ = 0;
        if (lower == 0) return clear_sums(running_, 0, p.features);
        // There is no segment where all blocks end: the last one, and the rest block by block.
        const int64_t segment = smaller(sums.segments.of(lower), sums.segments.count() - 1);
        next_ = sums.segments.first(segment);
        add_sums(running_, sums.before(segment), nullptr, nullptr, 0, p.features);
        for (; next_ < lower; ++next_) {
            const Sums more = sums.of(next_);
            add_sums(running_, more, more.log_scale, &running_, 0, p.features);
        }
    }

    // Reads for the blocks [begin, end), with the lower and upper ends of each. `bound`, at or beyond
    // all upper ends, is where a segment begins, or all blocks end.
    template <typename Lower, typename Upper>
    void read(const SegmentSums &sums, int64_t begin, int64_t end, int64_t bound, Lower &&lower,
              Upper &&upper) {
        for (int64_t first = 0; first < p.features; first += kPanel) {
            const int64_t last = smaller(p.features, first + kPanel);
            const auto add = [&](const Sums &to, int64_t block, const Sums &more) {
                const Sums from = sums.of(block);
                add_sums(to, from, from.log_scale, &more, first, last);
            };
            Sums above = of(end - 1 - begin);
            if (bound < sums.segments.blocks) {
                above = sums.from(sums.segments.of(bound));
            } else {
                clear_sums(above, first, last);
            }
            for (int64_t i = end - 1, block = bound; i >= begin; --i) {
                const Sums to = of(i - begin);
                if (block == upper(i) && to.key_value != above.key_value) {
                    add_sums(to, above, nullptr, nullptr, first, last);
                }
                for (; block > upper(i); above = to) add(to, --block, above);
                above = to;
            }
            int64_t block = next_;
            for (int64_t i = begin; i < end; ++i) {
                while (block < lower(i)) add(running_, block++, running_);
                const Sums to = of(i - begin);
                if (block > 0) add_sums(to, running_, nullptr, &to, first, last);
            }
        }
        next_ = larger(next_, lower(end - 1));
    }

    // What block i of the segment reads.
    Sums of(int64_t i) const { return Sums(p, memory_ + i * Sums::size(p)); }

private:
    Sums running_{arena, p};  // over the blocks before next_
    float *memory_ = arena.take(kSegment * Sums::size(p));
    int64_t next_ = 0;
};

}  // namespace
}  // namespace performers::PERFORMERS_ISA
