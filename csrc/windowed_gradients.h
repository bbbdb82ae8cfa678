// Gradients of calls with a window: queries read the sums over keys once more, then keys read the sums
// over queries in the same way. Features are kept from the one to the other.
#pragma once

#include "windowed_forward.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct WindowGradientBuffers : KeyBlock {
    using KeyBlock::KeyBlock;

    QueryGradientBlock q{arena, p};
    PairGradients pairs{arena, p};
    float *slope = arena.take(p.features * kBlock), *grad_value = arena.take(kBlock * p.padded_value);
    InputGradients inputs{arena, p};
    SegmentReader reader{arena, p};
    PartialKeys partial{arena, p};
};

// Gradients of the segments [begin, end) of queries; leaves their normalised features, and the
// gradients of the sums they read.
inline void windowed_query_gradients(const Problem &p, const WindowUnit &unit, int64_t begin,
                                     int64_t end, WindowGradientBuffers &b) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const int64_t first = grid.queries().first(begin), last = grid.queries().last(end - 1);
    // All stand at one scale.
    const auto start_sums = [&](const Sums &sums) {
        for (int64_t f = 0; f < p.features; ++f) {
            sums.key_sum[f] = 0;
            sums.log_scale[f] = 1;
        }
    };
    b.reader.start(unit.keys, grid.lower(first));
    for (int64_t block = first; block < last; ++block) {
        const Sums whole = unit.grads.from(block / kSegment), grads = unit.grads.of(block);
        if (block % kSegment == 0) {
            read_windowed_keys(unit, block / kSegment, b.reader);
            clear_sums(whole, 0, p.features);
            start_sums(whole);
        }
        if (!grid.reaches(block)) continue;
        const int64_t start = grid.query_begin(block), rows = grid.query_rows(block);
        b.partial.load_values(unit, block);
        Sums sums = b.reader.of(block % kSegment);
        sums.log_scale = unit.log_scale;
        start_sums(grads);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            float *features = unit.query_features_of(p, block, group);
            b.q.fetch(unit.head, group, start, rows);
            std::memcpy(unit.delta_of(p, block, group), b.q.delta, sizeof(float) * kBlock);
            project(p, unit.head, b.q.block, 0, p.features, features);
            value_products(p, p.features, rows, sums.key_value, b.q.grad_transposed, b.slope);
            grid.for_partial_keys(block, [&](int64_t i, int64_t c, Band band) {
                const int64_t keys = grid.key_rows(c);
                b.pairs.load_grads(keys, b.partial.values(i), b.q, band);
                b.pairs.add_to_queries(keys, b.q, b.partial.features(unit, c), band, b.slope);
            });
            query_slopes(p, b.q, sums, 0, p.features, features, b.slope, grads.key_sum);
            b.inputs.add(unit.head, b.q.block, 0, p.features, b.slope, true);
            b.inputs.finish(b.q.block, p.rows(p.call.grad_query, unit.head, group), start);
            sum_rows(p.padded_value, p.features, rows, features, b.q.grad, grads.key_value,
                     group > 0);
        }
        add_sums(whole, grads, nullptr, &whole, 0, p.features);
    }
}

// What the segment of keys reads that is next.
inline void read_windowed_gradients(const WindowUnit &unit, int64_t segment, SegmentReader &reader) {
    const WindowGrid &grid = unit.grid;
    const Segments segments = grid.reading_keys();
    const int64_t bound = (segment + 1) * kSegment - segments.shift + grid.behind;
    reader.read(
        unit.grads, segments.first(segment), segments.last(segment), smaller(grid.query_blocks, bound),
        [&](int64_t c) { return grid.key_lower(c); }, [&](int64_t c) { return grid.key_upper(c); });
}

// Gradients of the segments [begin, end) of keys.
inline void windowed_key_gradients(const Problem &p, const WindowUnit &unit, int64_t begin,
                                   int64_t end, WindowGradientBuffers &b) {
    const WindowGrid &grid = unit.grid;
    if (!grid.reaches()) return;
    const Segments segments = grid.reading_keys();
    const int64_t from = segments.first(begin), to = segments.last(end - 1);
    b.reader.start(unit.grads, grid.key_lower(from));
    for (int64_t c = from; c < to; ++c) {
        const int64_t segment = segments.of(c), place = c - segments.first(segment);
        if (place == 0) read_windowed_gradients(unit, segment, b.reader);
        if (!grid.needed(c)) continue;
        const int64_t start = grid.key_begin(c), rows = grid.key_rows(c);
        const Sums grads = b.reader.of(place);
        const float *features = b.partial.features(unit, c);
        b.load_keys(unit.head, start, rows, grid.span.first);
        b.transpose_values();
        value_products(p, p.features, rows, grads.key_value, b.value_transposed, b.slope);
        combine(p.padded_value, rows, p.features, features, grads.key_value, b.grad_value, false);
        grid.for_partial_queries(c, [&](int64_t block, Band band) {
            for (int64_t group = 0; group < p.call.groups; ++group) {
                const float *others = unit.query_features_of(p, block, group);
                b.q.fetch_grad(unit.head, group, grid.query_begin(block), grid.query_rows(block));
                std::memcpy(b.q.delta, unit.delta_of(p, block, group), sizeof(float) * kBlock);
                feature_pairs(p, rows, b.q.block.rows, features, others, band, b.pairs.weights);
                b.pairs.load_grads(rows, b.value, b.q, band);
                b.pairs.add_to_keys(rows, b.q, others, band, b.slope, b.grad_value);
            }
        });
        known_key_slopes(p, rows, features, grads.key_sum, b.slope);
        b.inputs.add(unit.head, b.block, 0, p.features, b.slope, true);
        b.inputs.finish_keys(unit.head, b.block, start, b.grad_value, grid.span.first);
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
