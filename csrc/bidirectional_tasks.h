// Bidirectional calls: heads, parts of heads, or packed sequences.
#pragma once

#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The keys and the queries of a head, each in one part if that keeps all threads busy.
struct BidirectionalParts {
    std::vector<Span> keys, queries;
    bool whole;  // or packed

    explicit BidirectionalParts(const Problem &p)
        : keys(parts(p, p.call.size)),
          queries(parts(p, p.call.length)),
          whole(p.call.segments || (keys.size() == 1 && queries.size() == 1)) {}

private:
    static std::vector<Span> parts(const Problem &p, int64_t length) {
        const int64_t threads = larger<int64_t>(1, p.call.threads);
        const int64_t wanted = p.heads % threads == 0 ? 1 : (4 * threads + p.heads - 1) / p.heads;
        return cut(length, p.call.size, parts_of(length, wanted));
    }
};

inline void forward_bidirectional(const Problem &p) {
    const BidirectionalParts parts(p);
    if (parts.whole) {
        return for_spans<ForwardBuffers>(
            p, sequences(p.call), [&](auto &b, int64_t head, const Span &span, int64_t) {
                b.sums.clear();
                absorb(p, head, span.first, span.last, b.sums, b.keys);
                b.sums.write(p.call.sums, head);
                read_out(p, head, span, &b.sums, b.queries);
            });
    }
    const int64_t count = static_cast<int64_t>(parts.keys.size());
    const ManySums partial(p, p.heads * count);
    for_spans<ForwardBuffers>(p, parts.keys, [&](auto &b, int64_t head, const Span &span, int64_t i) {
        b.sums.clear();
        absorb(p, head, span.begin, span.end, b.sums, b.keys);
        partial.at(i).copy(b.sums);
    });
    parallel(p, p.heads, [&](int64_t head) {
        const Sums sums = partial.at(head * count);
        for (int64_t i = 1; i < count; ++i) sums.merge(partial.at(head * count + i));
        sums.write(p.call.sums, head);
    });
    for_spans<ForwardBuffers>(p, parts.queries, [&](auto &b, int64_t head, const Span &span, int64_t) {
        b.sums.copy(partial.at(head * count));
        read_out(p, head, span, &b.sums, b.queries);
    });
}

inline void backward_bidirectional(const Problem &p, const WeightGradients &trained) {
    const BidirectionalParts parts(p);
    if (parts.whole) {
        return trained.for_spans<GradientBuffers>(
            sequences(p.call), [&](auto &b, int64_t head, const Span &span, int64_t) {
                b.sums.read(p.call.sums, head);
                // Keeping the sums of every short sequence would take more memory than the sequence.
                if (p.call.segments) absorb(p, head, span.first, span.last, b.sums, b);
                b.grad_sums.clear();
                query_gradients(p, head, span.begin, span.end, b);
                key_gradients(p, head, span.first, span.last, b);
            });
    }
    const int64_t count = static_cast<int64_t>(parts.queries.size());
    const ManySums partial(p, p.heads * count);
    trained.for_spans<GradientBuffers>(
        parts.queries, [&](auto &b, int64_t head, const Span &span, int64_t i) {
            b.sums.read(p.call.sums, head);
            b.grad_sums.clear();
            query_gradients(p, head, span.begin, span.end, b);
            partial.at(i).copy(b.grad_sums);
        });
    trained.for_spans<GradientBuffers>(
        parts.keys, [&](auto &b, int64_t head, const Span &span, int64_t) {
            b.sums.read(p.call.sums, head);
            b.grad_sums.copy(partial.at(head * count));
            for (int64_t i = 1; i < count; ++i) b.grad_sums.add(partial.at(head * count + i));
            key_gradients(p, head, span.begin, span.end, b);
        });
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
