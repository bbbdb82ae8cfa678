// The tasks of exact pairs: alone, and their share of all gradients.
#pragma once

#include "exact_gradients.h"
#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The gradients of sinks that one task gathers.
struct SinkGradients {
    float *key, *value;
};

// The exact pairs alone.
inline void forward_exact(const Problem &p) {
    const std::vector<Span> whole = sequences(p.call);
    const bool cutting = whole.size() == 1 && p.heads < p.call.threads;
    const int64_t parts = cutting ? parts_of(p.call.length, 2 * p.call.threads / p.heads) : 1;
    const std::vector<Span> spans = parts > 1 ? cut(p.call.length, p.call.size, parts) : whole;
    const int64_t count = static_cast<int64_t>(spans.size());
    parallel(p, p.heads * count, [&](int64_t i) {
        const int64_t head = i / count;
        const Span &span = spans[static_cast<size_t>(i % count)];
        auto b = in_scratch<QueryBuffers>(p);
        for (int64_t group = 0; group < p.call.groups; ++group) {
            const Rows queries = p.query_rows(p.call.query, head, group);
            for (int64_t start = span.begin; start < span.end; start += kBlock) {
                const int64_t rows = smaller(kBlock, span.end - start);
                b.block.load_queries(p, queries, start, rows);
                for (int64_t r = 0; r < kBlock; ++r) b.scale[r] = b.inverse[r] = 0;
                for (int64_t j = 0; j < rows * p.padded_value; ++j) b.out[j] = 0;
                exact_sums(p, head, span, start, b.block, b.exact);
                add_exact(p, rows, b.exact, b.out, b.scale, b.inverse);
                for (int64_t r = 0; r < rows; ++r) b.inverse[r] = inverse_of(b.inverse[r]);
                finish_rows(p, head, group, start, rows, b.out, b.scale, b.inverse);
            }
        }
    });
}

// Adds the exact share to all gradients, before the features add theirs.
inline void backward_exact(const Problem &p) {
    std::vector<Span> spans = sequences(p.call);
    // Parts of a sequence share keys with those nearby: of `apart` parts one runs at a time.
    int64_t apart = 1;
    if (spans.size() == 1 && p.heads < p.call.threads) {
        const int64_t parts = parts_of(p.call.length, 2 * p.call.threads / p.heads);
        if (parts > 1) {
            spans = cut(p.call.length, p.call.size, parts);
            const int64_t size = spans[0].end;
            if (p.window > 0) apart += (2 * p.window + size - 1) / size;
        }
    }
    const int64_t count = static_cast<int64_t>(spans.size());
    const int64_t keys = p.call.sinks * p.head_dim, values = p.call.sinks * p.value_dim;
    SharedMemory memory(p.heads * count * (keys + values));
    const auto sinks_of = [&](int64_t head, int64_t part) {
        float *at = memory.data() + (head * count + part) * (keys + values);
        return SinkGradients{at, at + keys};
    };
    for (int64_t phase = 0; phase < smaller(apart, count); ++phase) {
        const int64_t tasks = (count - phase + apart - 1) / apart;
        parallel(p, p.heads * tasks, [&](int64_t i) {
            const int64_t head = i / tasks, part = phase + i % tasks * apart;
            const SinkGradients sinks = sinks_of(head, part);
            for (int64_t j = 0; j < keys + values; ++j) sinks.key[j] = 0;
            auto b = in_scratch<ExactGradientBuffers>(p);
            exact_gradients(p, head, spans[static_cast<size_t>(part)], sinks.key, sinks.value, b);
        });
    }
    if (p.call.sinks == 0) return;
    for (int64_t head = 0; head < p.heads; ++head) {
        for (int64_t part = 0; part < count; ++part) {
            const Span &span = spans[static_cast<size_t>(part)];
            const int64_t sequence = p.sequence_of(head, span);
            const int64_t index = sequence * p.call.key_heads + p.key_head_of(head);
            const SinkGradients sinks = sinks_of(head, part);
            add_rows(sinks.key, keys, 1, keys, p.call.grad_sink_key + index * keys, keys);
            add_rows(sinks.value, values, 1, values, p.call.grad_sink_value + index * values,
                     values);
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
