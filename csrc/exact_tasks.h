// The tasks of exact pairs: alone, and their share of all gradients.
#pragma once

#include "exact_gradients.h"
#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

inline std::vector<Span> exact_spans(const Problem &p) {
    // Parts that share keys are told by rows.
    if (p.call.positions) return sequences(p.call);
    return sequences_or_parts(p, 2 * p.call.threads / p.heads);
}

// The exact pairs alone.
inline void forward_exact(const Problem &p) {
    for_spans<QueryBuffers>(p, exact_spans(p), [&](auto &b, int64_t head, const Span &span, int64_t) {
        read_out(p, head, span, nullptr, b);
    });
}

// Adds the exact share to all gradients, before the features add theirs.
inline void backward_exact(const Problem &p) {
    const std::vector<Span> spans = exact_spans(p);
    const int64_t count = static_cast<int64_t>(spans.size());
    // Parts of a sequence share keys with those nearby: of `apart` parts one runs at a time.
    int64_t apart = 1;
    if (count > 1 && spans[1].first == 0 && p.window > 0) {
        apart += (2 * p.window + spans[0].end - 1) / spans[0].end;
    }
    // The gradients of sinks that each task gathers.
    const int64_t keys = p.call.sinks * p.head_dim, values = p.call.sinks * p.value_dim;
    const SharedMemory memory(p.heads * count * (keys + values));
    const auto sinks_of = [&](int64_t head, int64_t part) {
        return memory.data + (head * count + part) * (keys + values);
    };
    for (int64_t phase = 0; phase < smaller(apart, count); ++phase) {
        const int64_t tasks = (count - phase + apart - 1) / apart;
        parallel(p, p.heads * tasks, [&](int64_t i) {
            const int64_t head = i / tasks, part = phase + i % tasks * apart;
            float *sinks = sinks_of(head, part);
            for (int64_t j = 0; j < keys + values; ++j) sinks[j] = 0;
            auto b = in_scratch<ExactGradientBuffers>(p);
            exact_gradients(p, head, spans[static_cast<size_t>(part)], sinks, sinks + keys, b);
        });
    }
    if (p.call.sinks == 0) return;
    for (int64_t i = 0; i < p.heads * count; ++i) {
        const int64_t head = i / count, sequence = p.sequence_of(head, spans[i % count]);
        const int64_t index = sequence * p.call.key_heads + p.key_head_of(head);
        const float *sinks = sinks_of(head, i % count);
        for (int64_t j = 0; j < keys; ++j) p.call.grad_sink_key[index * keys + j] += sinks[j];
        for (int64_t j = 0; j < values; ++j) {
            p.call.grad_sink_value[index * values + j] += sinks[keys + j];
        }
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
