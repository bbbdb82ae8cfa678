// The backward pass of windowed.h: queries read the sums over keys once more, then keys read the sums
// over queries in the same way. Features are kept from the one to the other.
#pragma once

#include "windowed.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct FarGradientBuffers {
    QueryGradientBlock q;
    Block block;
    float *keep, *value, *value_transposed;
    float *pairs, *pair_grads, *pair_grads_rows;  // (kBlock, kBlock)
    float *slope, *slope_sum;                     // (features, kBlock) and (kBlock)
    float *grad_x, *grad_value;
    SegmentReader reader;
    FarFeatures features;
    WeightSums trained;

    FarGradientBuffers(Arena &arena, const Problem &p)
        : q(arena, p),
          block(arena, p),
          keep(arena.take(kBlock)),
          value(arena.take(kPartial * kBlock * p.padded_value)),
          value_transposed(arena.take(p.padded_value * kBlock)),
          pairs(arena.take(kBlock * kBlock)),
          pair_grads(arena.take(kBlock * kBlock)),
          pair_grads_rows(arena.take(kBlock * kBlock)),
          slope(arena.take(p.features * kBlock)),
          slope_sum(arena.take(kBlock)),
          grad_x(arena.take(kBlock * p.padded_dim)),
          grad_value(arena.take(kBlock * p.padded_value)),
          reader(arena, p),
          features(arena, p) {}
};

// d loss / d (normalised pair): grad_i . v_j - delta_i within the band, zero elsewhere.
inline void far_pair_gradients(const Problem &p, int64_t keys, int64_t rows, const float *value,
                               const float *delta, Band band, FarGradientBuffers &b) {
    multiply_band(keys, rows, p.value_dim, rows_of(value, p.padded_value), b.q.grad_transposed,
                  kBlock, b.pair_grads, kBlock, band);
    for (int64_t t = 0; t < keys; ++t) {
        for (int64_t r = 0; r < rows; r += kWidth) {
            float *at = b.pair_grads + t * kBlock + r;
            store(at, load(at) - load(delta + r));
        }
    }
    clear_outside(b.pair_grads, keys, rows, band);
}

// Gradients of the segments [begin, end) of queries; leaves their normalised features, and the
// gradients of the sums they read.
inline void far_query_gradients(const Problem &p, const FarUnit &unit, int64_t begin, int64_t end,
                                FarGradientBuffers &b) {
    const FarGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const float *weights = p.weights_of(unit.head);
    const int64_t first = grid.queries().first(begin), last = grid.queries().last(end - 1);
    b.reader.start(p, unit.keys, grid.keys(), true, grid.lower(first));
    for (int64_t block = first; block < last; ++block) {
        const int64_t segment = block / kSegment;
        const Sums whole = unit.grads.from_segment(p, segment);
        if (block % kSegment == 0) {
            read_far_keys(p, unit, segment, b.reader);
            clear_sums(p, whole, 0, p.features);
        }
        if (!grid.reaches(block)) continue;
        const int64_t start = grid.query_begin(block), rows = grid.query_rows(block);
        int64_t partial = 0;
        grid.for_partial_keys(block, [&](int64_t c, Band) {
            far_values(p, unit, c, b.keep, b.value + partial++ * kBlock * p.padded_value);
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
                far_pair_gradients(p, keys, rows, b.value + partial++ * kBlock * p.padded_value,
                                   delta, band, b);
                multiply(p.features, rows, keys, rows_of(b.features.of(p, unit, c), kBlock),
                         b.pair_grads, kBlock, b.slope, kBlock, true, by_column(band));
            });
            query_slopes(p, b.q, sums, 0, p.features, features, b.slope, grads.key_sum);
            for (int64_t r = 0; r < kBlock; ++r) b.slope_sum[r] = 0;
            sum_slopes(b.slope, p.features, rows, b.slope_sum);
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
inline void read_far_gradients(const Problem &p, const FarUnit &unit, int64_t segment,
                               SegmentReader &reader) {
    const FarGrid &grid = unit.grid;
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
inline void far_key_gradients(const Problem &p, const FarUnit &unit, int64_t begin, int64_t end,
                              FarGradientBuffers &b) {
    const FarGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const float *weights = p.weights_of(unit.head);
    const Rows keys = p.key_rows(p.call.key, unit.head);
    const Rows grad_keys = p.key_rows(p.call.grad_key, unit.head);
    const Rows grad_values = p.key_rows(p.call.grad_value, unit.head);
    const Rows values = p.key_rows(p.call.value, unit.head);
    const Segments segments = grid.reading_keys();
    const int64_t from = segments.first(begin), to = segments.last(end - 1);
    b.reader.start(p, unit.grads, grid.queries(), false, grid.key_lower(from));
    for (int64_t c = from; c < to; ++c) {
        const int64_t segment = segments.of(c), place = c - segments.first(segment);
        if (place == 0) read_far_gradients(p, unit, segment, b.reader);
        if (!grid.needed(c)) continue;
        const int64_t start = grid.key_begin(c), rows = grid.key_rows(c);
        const Sums grads = b.reader.of(p, place);
        const float *features = b.features.of(p, unit, c);
        b.block.load_keys(p, keys, p.mask(unit.head), start, rows, b.keep, grid.span.first);
        load_values(p, values, start, rows, b.keep, b.value);
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
                far_pair_gradients(p, rows, queries, b.value, unit.delta_of(p, block, group), band,
                                   b);
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
        finish_gradients(p, grad_keys, start, b.block, b.grad_x, b.slope_sum, grid.span.first);
        for (int64_t r = larger<int64_t>(0, grid.span.first - start); r < rows; ++r) {
            write_gradient(p, grad_values, start + r, p.value_dim,
                           b.grad_value + r * p.padded_value);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
