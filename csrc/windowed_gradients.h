// Gradients of calls with a window: queries read the sums over keys once more, then keys read the sums
// over queries in the same way. Features are kept from the one to the other.
#pragma once

#include "windowed_forward.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct WindowGradientBuffers : Buffers {
    using Buffers::Buffers;

    QueryGradientBlock q{arena, p};
    Block block{arena, p};
    float *keep = arena.take(kBlock), *value = arena.take(kPartial * kBlock * p.padded_value);
    float *value_transposed = arena.take(p.padded_value * kBlock);
    float *pairs = arena.take(kBlock * kBlock), *pair_grads = arena.take(kBlock * kBlock);
    float *pair_grads_rows = arena.take(kBlock * kBlock);
    float *slope = arena.take(p.features * kBlock), *slope_sum = arena.take(kBlock);
    float *grad_x = arena.take(kBlock * p.padded_dim);
    float *grad_value = arena.take(kBlock * p.padded_value);
    SegmentReader reader{arena, p};
    WindowFeatures features{arena, p};
    WeightSums trained;
};

// Gradients of the segments [begin, end) of queries; leaves their normalised features, and the
// gradients of the sums they read.
inline void windowed_query_gradients(const Problem &p, const WindowUnit &unit, int64_t begin, int64_t end,
                                WindowGradientBuffers &b) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const float *weights = p.weights_of(unit.head);
    const int64_t first = grid.queries().first(begin), last = grid.queries().last(end - 1);
    b.reader.start(p, unit.keys, grid.keys(), true, grid.lower(first));
    for (int64_t block = first; block < last; ++block) {
        const int64_t segment = block / kSegment;
        const Sums whole = unit.grads.from_segment(p, segment);
        if (block % kSegment == 0) {
            read_windowed_keys(p, unit, segment, b.reader);
            clear_sums(p, whole, 0, p.features);
        }
        if (!grid.reaches(block)) continue;
        const int64_t start = grid.query_begin(block), rows = grid.query_rows(block);
        int64_t partial = 0;
        grid.for_partial_keys(block, [&](int64_t c, Band) {
            windowed_values(p, unit, c, b.keep, b.value + partial++ * kBlock * p.padded_value);
        });
        Sums sums = b.reader.of(p, block % kSegment);
        sums.log_scale = unit.log_scale;
        const Sums grads = unit.grads.of(p, block);
        for (int64_t f = 0; f < p.features; ++f) grads.key_sum[f] = 0;
        for (int64_t group = 0; group < p.call.groups; ++group) {
            float *features = unit.query_features_of(p, block, group);
            b.q.fetch(p, unit.head, group, start, rows);
            const float *delta = unit.delta_of(p, block, group);
            std::memcpy(unit.delta_of(p, block, group), b.q.delta, sizeof(float) * kBlock);
            project(p, weights, b.q.block, p.query_inner, 0, p.features, features);
            multiply(p.features, rows, p.value_dim, rows_of(sums.key_value, p.padded_value),
                     b.q.grad_transposed, kBlock, b.slope, kBlock, false);
            partial = 0;
            grid.for_partial_keys(block, [&](int64_t c, Band band) {
                const int64_t keys = grid.key_rows(c);
                pair_gradients(p, keys, rows, b.value + partial++ * kBlock * p.padded_value,
                               b.q.grad_transposed, delta, band, b.pair_grads);
                multiply(p.features, rows, keys, rows_of(b.features.of(p, unit, c), kBlock),
                         b.pair_grads, kBlock, b.slope, kBlock, true, by_column(band));
            });
            query_slopes(p, b.q, sums, 0, p.features, features, b.slope, grads.key_sum);
            for (int64_t r = 0; r < kBlock; ++r) b.slope_sum[r] = 0;
            add_up(b.slope, p.features, rows, b.slope_sum);
            b.trained.add(p, unit.head, 0, p.features, b.slope, b.q.block);
            multiply(rows, p.padded_dim, p.features, columns_of(b.slope, kBlock), weights,
                     p.weight_stride, b.grad_x, p.padded_dim, false);
            finish_gradients(p, p.query_rows(p.call.grad_query, unit.head, group), start, b.q.block,
                             b.grad_x, b.slope_sum);
            multiply(p.features, p.padded_value, rows, rows_of(features, kBlock), b.q.grad,
                     p.padded_value, grads.key_value, p.padded_value, group > 0);
        }
        add_sums(p, whole, grads, nullptr, &whole, 0, p.features);
    }
}

// What the segment of keys reads that is next.
inline void read_windowed_gradients(const Problem &p, const WindowUnit &unit, int64_t segment,
                               SegmentReader &reader) {
    const WindowGrid &grid = unit.grid;
    const Segments segments = grid.reading_keys();
    const int64_t first = segments.first(segment), last = segments.last(segment);
    int64_t lower[kSegment], upper[kSegment];
    for (int64_t c = first; c < last; ++c) {
        lower[c - first] = grid.key_lower(c);
        upper[c - first] = grid.key_upper(c);
    }
    const int64_t bound = (segment + 1) * kSegment - segments.shift + grid.behind;
    reader.read(p, unit.grads, grid.queries(), false, last - first, lower, upper,
                smaller(grid.query_blocks, bound));
}

// Gradients of the segments [begin, end) of keys.
inline void windowed_key_gradients(const Problem &p, const WindowUnit &unit, int64_t begin, int64_t end,
                              WindowGradientBuffers &b) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const float *weights = p.weights_of(unit.head);
    const Segments segments = grid.reading_keys();
    const int64_t from = segments.first(begin), to = segments.last(end - 1);
    b.reader.start(p, unit.grads, grid.queries(), false, grid.key_lower(from));
    for (int64_t c = from; c < to; ++c) {
        const int64_t segment = segments.of(c), place = c - segments.first(segment);
        if (place == 0) read_windowed_gradients(p, unit, segment, b.reader);
        if (!grid.needed(c)) continue;
        const int64_t start = grid.key_begin(c), rows = grid.key_rows(c);
        const Sums grads = b.reader.of(p, place);
        const float *features = b.features.of(p, unit, c);
        load_keys_and_values(p, unit.head, start, rows, b.block, b.keep, b.value, grid.span.first);
        transpose(b.value, p.padded_value, rows, p.padded_value, b.value_transposed);
        multiply(p.features, rows, p.value_dim, rows_of(grads.key_value, p.padded_value),
                 b.value_transposed, kBlock, b.slope, kBlock, false);
        multiply(rows, p.padded_value, p.features, columns_of(features, kBlock), grads.key_value,
                 p.padded_value, b.grad_value, p.padded_value, false);
        grid.for_partial_queries(c, [&](int64_t block, Band band) {
            const int64_t queries = grid.query_rows(block);
            for (int64_t group = 0; group < p.call.groups; ++group) {
                const float *others = unit.query_features_of(p, block, group);
                b.q.fetch_grad(p, unit.head, group, grid.query_begin(block), queries);
                multiply_band(rows, queries, p.features, columns_of(features, kBlock), others,
                              kBlock, b.pairs, kBlock, band);
                clear_outside(b.pairs, rows, queries, band);
                pair_gradients(p, rows, queries, b.value, b.q.grad_transposed,
                               unit.delta_of(p, block, group), band, b.pair_grads);
                for (int64_t t = rows; t < round_up(rows, kWidth); ++t) {
                    for (int64_t s = 0; s < kBlock; ++s) b.pair_grads[t * kBlock + s] = 0;
                }
                transpose(b.pair_grads, kBlock, rows, round_up(queries, kWidth), b.pair_grads_rows);
                multiply(p.features, rows, queries, rows_of(others, kBlock), b.pair_grads_rows,
                         kBlock, b.slope, kBlock, true, by_column(band.reversed()));
                multiply(rows, p.padded_value, queries, rows_of(b.pairs, kBlock), b.q.grad,
                         p.padded_value, b.grad_value, p.padded_value, true,
                         by_row(band.reversed()));
            }
        });
        for (int64_t r = 0; r < rows; r += kWidth) {
            Vector sum = splat(0.0f);
            for (int64_t f = 0; f < p.features; ++f) {
                float *at = b.slope + f * kBlock + r;
                const Vector grad =
                    load(features + f * kBlock + r) * (load(at) + splat(grads.key_sum[f]));
                store(at, grad);
                sum += grad;
            }
            store(b.slope_sum + r, sum);
        }
        b.trained.add(p, unit.head, 0, p.features, b.slope, b.block);
        multiply(rows, p.padded_dim, p.features, columns_of(b.slope, kBlock), weights,
                 p.weight_stride, b.grad_x, p.padded_dim, false);
        finish_key_gradients(p, unit.head, start, b.block, b.grad_x, b.slope_sum, b.grad_value,
                             grid.span.first);
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
