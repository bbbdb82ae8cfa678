// Bidirectional calls: heads, parts of heads, or packed sequences.
#pragma once

#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Whole sequences: heads, or the packed sequences of heads.
inline void forward_sequences(const Problem &p) {
    const std::vector<Span> spans = sequences(p.call);
    const int64_t count = static_cast<int64_t>(spans.size());
    parallel(p, p.heads * count, [&](int64_t i) {
        const Span span = spans[static_cast<size_t>(i % count)];
        auto b = in_scratch<ForwardBuffers>(p);
        b.sums.clear(p);
        absorb(p, i / count, span.first, span.last, b.sums, b.keys);
        if (!p.call.segments) export_bidirectional(p, i / count, b.sums);
        read_out(p, i / count, span, b.sums, b.queries);
    });
}

// Tasks for each head of a bidirectional call: one if that keeps all threads busy.
inline int64_t bidirectional_parts(const Problem &p, int64_t length) {
    const int64_t threads = larger<int64_t>(1, p.call.threads);
    if (p.heads % threads == 0) return 1;
    return parts_of(length, (4 * threads + p.heads - 1) / p.heads);
}

inline void forward_bidirectional(const Problem &p) {
    const int64_t key_parts = bidirectional_parts(p, p.call.size);
    const int64_t query_parts = bidirectional_parts(p, p.call.length);
    if (p.call.segments || (key_parts == 1 && query_parts == 1)) return forward_sequences(p);
    SharedMemory memory(p.heads * key_parts * Sums::size(p));
    const std::vector<Span> keys = cut(p.call.size, p.call.size, key_parts);
    const std::vector<Span> queries = cut(p.call.length, p.call.size, query_parts);
    const auto partial = [&](int64_t i) { return Sums(memory.data() + i * Sums::size(p), p); };
    parallel(p, p.heads * key_parts, [&](int64_t i) {
        auto b = in_scratch<ForwardBuffers>(p);
        const Span span = keys[static_cast<size_t>(i % key_parts)];
        b.sums.clear(p);
        absorb(p, i / key_parts, span.begin, span.end, b.sums, b.keys);
        partial(i).copy(p, b.sums);
    });
    parallel(p, p.heads, [&](int64_t head) {
        const Sums sums = partial(head * key_parts);
        for (int64_t i = 1; i < key_parts; ++i) sums.merge(p, partial(head * key_parts + i));
        export_bidirectional(p, head, sums);
    });
    parallel(p, p.heads * query_parts, [&](int64_t i) {
        auto b = in_scratch<ForwardBuffers>(p);
        const Span span = queries[static_cast<size_t>(i % query_parts)];
        b.sums.copy(p, partial(i / query_parts * key_parts));
        read_out(p, i / query_parts, span, b.sums, b.queries);
    });
}

struct BackwardBuffers : Buffers {
    using Buffers::Buffers;

    KeyBuffers forward_keys{arena, p};
    QueryGradientBuffers queries{arena, p};
    KeyGradientBuffers keys{arena, p};
    Sums sums{arena.take(Sums::size(p)), p}, grad_sums{arena.take(Sums::size(p)), p};

    void train(const WeightSums &trained) { queries.trained = keys.trained = trained; }
};

inline void backward_sequences(const Problem &p, const WeightGradients &trained) {
    const std::vector<Span> spans = sequences(p.call);
    const int64_t count = static_cast<int64_t>(spans.size());
    trained.parallel_tasks(p.heads * count, [&](int64_t i, const WeightSums &sums) {
        const int64_t head = i / count;
        const Span span = spans[static_cast<size_t>(i % count)];
        auto b = in_scratch<BackwardBuffers>(p);
        b.train(sums);
        if (p.call.segments) {
            // Keeping the sums of every short sequence would take more memory than the sequence.
            b.sums.clear(p);
            absorb(p, head, span.first, span.last, b.sums, b.forward_keys);
        } else {
            import_bidirectional(p, head, b.sums);
        }
        b.grad_sums.clear(p);
        query_gradients(p, head, span.begin, span.end, b.sums, b.grad_sums, b.queries);
        key_gradients(p, head, span.first, span.last, b.sums, b.grad_sums, b.keys);
    });
}

inline void backward_bidirectional(const Problem &p, const WeightGradients &trained) {
    const int64_t key_parts = bidirectional_parts(p, p.call.size);
    const int64_t query_parts = bidirectional_parts(p, p.call.length);
    if (p.call.segments || (key_parts == 1 && query_parts == 1)) {
        return backward_sequences(p, trained);
    }
    SharedMemory memory(p.heads * query_parts * Sums::size(p));
    const std::vector<Span> keys = cut(p.call.size, p.call.size, key_parts);
    const std::vector<Span> queries = cut(p.call.length, p.call.size, query_parts);
    const auto partial = [&](int64_t i) { return Sums(memory.data() + i * Sums::size(p), p); };
    trained.parallel_tasks(p.heads * query_parts, [&](int64_t i, const WeightSums &sums) {
        auto b = in_scratch<BackwardBuffers>(p);
        b.train(sums);
        const Span span = queries[static_cast<size_t>(i % query_parts)];
        import_bidirectional(p, i / query_parts, b.sums);
        b.grad_sums.clear(p);
        query_gradients(p, i / query_parts, span.begin, span.end, b.sums, b.grad_sums, b.queries);
        partial(i).copy(p, b.grad_sums);
    });
    trained.parallel_tasks(p.heads * key_parts, [&](int64_t i, const WeightSums &sums) {
        auto b = in_scratch<BackwardBuffers>(p);
        b.train(sums);
        const int64_t head = i / key_parts;
        const Span span = keys[static_cast<size_t>(i % key_parts)];
        import_bidirectional(p, head, b.sums);
        b.grad_sums.copy(p, partial(head * query_parts));
        for (int64_t part = 1; part < query_parts; ++part) {
            b.grad_sums.add(p, partial(head * query_parts + part));
        }
        key_gradients(p, head, span.begin, span.end, b.sums, b.grad_sums, b.keys);
    });
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
