// Exact pairs: queries of a block and the keys within the window or among the sinks, each with
// exp(scale q . k). One pass over the keys in reach with a running maximum for each row, as in a
// softmax; the result meets that of the features on one scale.
#pragma once

#include "feature_blocks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Up to kBlock keys that rows of a block of queries meet exactly: key t the rows from[t] to to[t].
struct ExactKeys : Buffers {
    using Buffers::Buffers;

    float *x = arena.take(kBlock * p.padded_dim), *value = arena.take(kBlock * p.padded_value);
    int64_t count = 0;
    Band band = {};  // t - row for all pairs
    int64_t from[kBlock], to[kBlock];
    // Where the keys come from: rows of the keys from `row` on, or the sinks of a sequence.
    int64_t row = 0, sequence = 0;
    bool sinks = false;

    // The keys [begin, begin + number), for the queries [start, start + rows).
    void load_window(int64_t head, int64_t begin, int64_t number, int64_t start, int64_t rows) {
        const int64_t position = start + p.call.offset - begin;  // of the first query
        sinks = false;
        row = begin;
        count = number;
        band = {position - p.window, p.call.causal ? position : position + p.window};
        for (int64_t t = 0; t < count; ++t) {
            from[t] = larger<int64_t>(0, t - band.high);
            to[t] = smaller(rows, t - band.low + 1);
        }
        if (const int64_t *positions = p.positions(head)) {
            band = kAll;
            int64_t first = 0, last = 0;
            for (int64_t t = 0; t < count; ++t) {
                const int64_t key = positions[begin + t];
                while (first < rows && positions[start + first] < key - p.call.window) ++first;
                while (last < rows && positions[start + last] <= key + p.call.window) ++last;
                from[t] = first;
                to[t] = last;
            }
        }
        const uint8_t *mask = p.mask(head);
        for (int64_t t = 0; mask && t < count; ++t) {
            if (!mask[begin + t]) from[t] = to[t] = 0;
        }
        load(p.rows(p.call.key, head), p.rows(p.call.value, head));
    }

    void load_sinks(int64_t head, const Span &span, int64_t begin, int64_t number, int64_t start,
                    int64_t rows) {
        sinks = true;
        sequence = p.sequence_of(head, span);
        row = begin;
        count = number;
        band = kAll;
        const int64_t *first = p.call.sink_first + sequence * p.call.sinks + begin;
        for (int64_t t = 0; t < count; ++t) {
            from[t] = larger<int64_t>(0, first[t] - start);
            to[t] = rows;
        }
        const int64_t which = p.key_head_of(head);
        load(rows_at(p.call.sink_key, sequence, which, 0),
             rows_at(p.call.sink_value, sequence, which, 0));
    }

    bool empty() const {
        for (int64_t t = 0; t < count; ++t) {
            if (from[t] < to[t]) return false;
        }
        return true;
    }

    // Whether some, and whether all rows of the vector from `column` on meet key t.
    bool some(int64_t t, int64_t column) const {
        return from[t] < column + kWidth && column < to[t];
    }
    bool all(int64_t t, int64_t column) const {
        return from[t] <= column && column + kWidth <= to[t];
    }

    // x where a row of the vector meets key t, `other` elsewhere.
    Vector where_met(int64_t t, int64_t column, Vector x, Vector other) const {
        if (all(t, column)) return x;
        Integers index;
        for (int i = 0; i < kWidth; ++i) index[i] = i;
        const int32_t low = static_cast<int32_t>(larger<int64_t>(from[t] - column, 0));
        const int32_t high = static_cast<int32_t>(smaller<int64_t>(to[t] - column, kWidth));
        return ((index >= low) & (index < high)) ? x : other;
    }

private:
    // Keys that meet no row are not read: they may hold anything.
    void load(const Rows &keys, const Rows &values) {
        for (int64_t t = 0; t < count; ++t) {
            const bool met = from[t] < to[t];
            read(keys, row + t, met ? p.head_dim : 0, p.padded_dim, x + t * p.padded_dim);
            read(values, row + t, met ? p.value_dim : 0, p.padded_value, value + t * p.padded_value);
        }
        p.check(x, count * p.padded_dim);
        p.check(value, count * p.padded_value);
    }
};

// The keys [first, last) that hold all those within the windows of the queries [start, start + rows).
struct KeyRange {
    int64_t first, last;

    KeyRange(const Problem &p, int64_t head, const Span &span, int64_t start, int64_t rows) {
        const int64_t position = start + p.call.offset, after = p.call.causal ? 0 : p.window;
        first = larger(span.first, position - p.window);
        last = smaller(span.last, position + rows + after);
        if (const int64_t *positions = p.positions(head)) {
            first = span.first + count(positions + span.first, span.last - span.first,
                                       positions[start] - p.call.window);
            last = first + count(positions + first, span.last - first,
                                 positions[start + rows - 1] + p.call.window + 1);
        }
    }

private:
    // How many of the `size` rising numbers are less than `bound`.
    static int64_t count(const int64_t *x, int64_t size, int64_t bound) {
        int64_t low = 0;
        while (low < size) {
            const int64_t middle = low + (size - low) / 2;
            if (x[middle] < bound) {
                low = middle + 1;
            } else {
                size = middle;
            }
        }
        return low;
    }
};

// Calls visit() for every block of keys that some of the queries [start, start + rows) meet, loaded
// into `keys`.
template <typename Visit>
inline void for_exact_keys(const Problem &p, int64_t head, const Span &span, int64_t start,
                           int64_t rows, ExactKeys &keys, Visit &&visit) {
    if (p.call.part == PERFORMERS_FEATURES) return;  // as if no key were in reach
    if (p.window >= 0) {
        const KeyRange range(p, head, span, start, rows);
        for (int64_t j = range.first; j < range.last; j += kBlock) {
            keys.load_window(head, j, smaller(kBlock, range.last - j), start, rows);
            if (!keys.empty()) visit();
        }
    }
    for (int64_t j = 0; j < p.call.sinks; j += kBlock) {
        keys.load_sinks(head, span, j, smaller(kBlock, p.call.sinks - j), start, rows);
        if (!keys.empty()) visit();
    }
}

// Scores of pairs in binary logarithms are this times q . k.
inline float score_unit(const Problem &p) { return static_cast<float>(p.call.scale * kLog2e); }

// pairs (count, kBlock) = k . q, where they meet.
inline void exact_products(const Problem &p, const ExactKeys &keys, const Block &queries,
                           float *pairs) {
    multiply_band(keys.count, queries.rows, p.head_dim, rows_of(keys.x, p.padded_dim),
                  queries.transposed, kBlock, pairs, kBlock, keys.band);
}

struct ExactBuffers : Buffers {
    using Buffers::Buffers;

    ExactKeys keys{arena, p};
    float *pairs = arena.take(kBlock * kBlock);  // (kBlock keys, kBlock rows)
    float *out = arena.take(kBlock * p.padded_value);  // (kBlock rows, padded_value)
    float *scale = arena.take(kBlock), *normaliser = arena.take(kBlock);  // (kBlock)
    float *factor = arena.take(kBlock), *other_factor = arena.take(kBlock);
    float *offset = arena.take(kBlock);  // what the scale of a row's features lacks
};

// Up to kBlock rows on their way: sums of values, and for each row the sum of its weights and the
// binary logarithm of the scale of both.
struct QueryBuffers : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    ExactBuffers exact{arena, p};
    float *features = arena.take(p.features * kBlock), *out = arena.take(kBlock * p.padded_value);
    float *scale = arena.take(kBlock), *normaliser = arena.take(kBlock);

    // Sums over nothing.
    void clear() {
        for (int64_t r = 0; r < kBlock; ++r) scale[r] = normaliser[r] = 0;
        for (int64_t i = 0; i < block.rows * p.padded_value; ++i) out[i] = 0;
    }
};

// Products become weights at the scale of each row, raised where they exceed it; `factor` is what
// sums at the former scale are multiplied with. Returns whether any changed.
inline bool exact_weights(const Problem &p, int64_t rows, ExactBuffers &e) {
    const ExactKeys &keys = e.keys;
    const Vector unit = splat(score_unit(p)), hidden = splat(-kInfinity);
    bool changed = false;
    for (int64_t r = 0; r < rows; r += kWidth) {
        const Vector before = load(e.scale + r);
        Vector peak = before, sum = splat(0.0f);
        for (int64_t t = 0; t < keys.count; ++t) {
            if (!keys.some(t, r)) continue;
            float *at = e.pairs + t * kBlock + r;
            const Vector score = keys.where_met(t, r, load(at) * unit, hidden);
            store(at, score);
            peak = maximum(peak, score);
        }
        for (int64_t t = 0; t < keys.count; ++t) {
            float *at = e.pairs + t * kBlock + r;
            if (keys.some(t, r)) {
                const Vector weight = exp2(load(at) - peak);
                store(at, weight);
                sum += weight;
            } else {
                store(at, splat(0.0f));
            }
        }
        const Vector factor = exp2(before - peak);
        changed |= any_greater(peak, before);
        store(e.factor + r, factor);
        store(e.scale + r, peak);
        store(e.normaliser + r, load(e.normaliser + r) * factor + sum);
    }
    return changed;
}

// Sums over the exact pairs of the queries from `start` on, which are loaded: b.exact.out and
// normaliser at b.exact.scale, the largest score of each row (kLowest for a row without).
inline void exact_sums(const Problem &p, int64_t head, const Span &span, int64_t start,
                       QueryBuffers &b) {
    ExactBuffers &e = b.exact;
    const int64_t rows = b.block.rows;
    for (int64_t r = 0; r < kBlock; ++r) {
        e.scale[r] = kLowest;
        e.normaliser[r] = 0;
    }
    b.block.offsets(e.offset);
    bool any = false;
    for_exact_keys(p, head, span, start, rows, e.keys, [&]() {
        exact_products(p, e.keys, b.block, e.pairs);
        const bool changed = exact_weights(p, rows, e);
        for (int64_t r = 0; any && changed && r < rows; ++r) {
            if (e.factor[r] == 1) continue;
            scale_vectors(e.out + r * p.padded_value, p.padded_value, e.factor[r]);
        }
        combine(p.padded_value, rows, e.keys.count, e.pairs, e.keys.value, e.out, any,
                by_row(e.keys.band));
        any = true;
    });
    if (any) return;
    for (int64_t i = 0; i < rows * p.padded_value; ++i) e.out[i] = 0;
}

// Adds the exact pairs to what features gave, whose normaliser is below zero for rows that had to be
// summed at a scale of their own.
inline void add_exact(const Problem &p, QueryBuffers &b) {
    const ExactBuffers &e = b.exact;
    const Vector zero = splat(0.0f), lowest = splat(kLowest);
    for (int64_t r = 0; r < b.block.rows; r += kWidth) {
        const Vector signed_sum = load(b.normaliser + r);
        const Vector sign = signed_sum < zero ? splat(-1.0f) : splat(1.0f);
        const Vector sum = signed_sum * sign, exact = load(e.scale + r);
        const Vector features = sum == zero ? lowest : load(b.scale + r) + load(e.offset + r);
        Vector peak = maximum(exact, features);
        peak = peak == lowest ? zero : peak;
        const Vector mine = exp2(features - peak), others = exp2(exact - peak);
        store(e.factor + r, others);
        store(e.other_factor + r, mine);
        store(b.scale + r, peak);
        store(b.normaliser + r, sign * (sum * mine + load(e.normaliser + r) * others));
    }
    for (int64_t r = 0; r < b.block.rows; ++r) {
        float *row = b.out + r * p.padded_value;
        const float *more = e.out + r * p.padded_value;
        const Vector mine = splat(e.other_factor[r]), others = splat(e.factor[r]);
        for (int64_t c = 0; c < p.padded_value; c += kWidth) {
            store(row + c, load(row + c) * mine + load(more + c) * others);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
