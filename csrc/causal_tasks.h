// Causal calls: heads, packed sequences, or parts of one sequence with a scan over their sums.
#pragma once

#include "causal_gradients.h"
#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The spans of a call, and the sums that each starts from: packed sequences start afresh, the parts of
// one sequence from those before them.
class CausalSpans {
public:
    const std::vector<Span> list;
    const int64_t count = static_cast<int64_t>(list.size());
    const bool scan = count > 1 && list[1].first == 0;  // whether they are parts

    explicit CausalSpans(const Problem &p)
        : list(sequences_or_parts(p, (p.call.threads + p.heads - 1) / p.heads)),
          p_(p),
          entering_(p, scan ? p.heads * count : 0) {
        if (!scan) return;
        // The sums of a part first stand in the place of those that enter the next one.
        for_spans<ForwardBuffers>(p, list, [&](auto &b, int64_t head, const Span &span, int64_t i) {
            if (is_last(i)) return;
            b.sums.clear();
            absorb(p, head, larger(span.first, span.begin + p.shift), span.end + p.shift, b.sums,
                   b.keys);
            entering_.at(i + 1).copy(b.sums);
        });
        parallel(p, p.heads, [&](int64_t head) {
            entering_.at(head * count).read(p.call.past, head, kNatural);
            for (int64_t i = head * count + 1; i < (head + 1) * count; ++i) {
                entering_.at(i).merge(entering_.at(i - 1));
            }
        });
    }

    bool is_last(int64_t i) const { return i % count == count - 1; }

    // The sums before span i.
    void enter(int64_t i, const Sums &sums) const {
        if (scan) return sums.copy(entering_.at(i));
        sums.read(p_.call.past, i / count, kNatural);
    }

private:
    const Problem &p_;
    ManySums entering_;
};

inline void forward_causal(const Problem &p) {
    const CausalSpans spans(p);
    for_spans<CausalBuffers>(p, spans.list, [&](auto &b, int64_t head, const Span &span, int64_t i) {
        spans.enter(i, b.sums);
        causal_rows(p, head, span, b);
        if (spans.is_last(i)) export_state(p, head, b.sums);
    });
}

inline performers_sums grad_past(const Problem &p) {
    return {p.call.grad_past_key_value, p.call.grad_past_key_sum, nullptr};
}

// Rows of log scales: before each chunk, and after the last.
inline int64_t scale_rows(Span span) { return (span.end - span.begin + kBlock - 1) / kBlock + 1; }

inline void backward_causal_sequences(const Problem &p, const CausalSpans &spans,
                                      const WeightGradients &trained) {
    trained.for_spans<CausalGradientBuffers>(
        spans.list, [&](auto &b, int64_t head, const Span &span, int64_t i) {
            const SharedMemory scales(scale_rows(span) * p.features);
            spans.enter(i, b.sums);
            causal_query_gradients(p, head, span, scales.data, false, b);
            b.grad_sums.read({p.call.grad_key_value, p.call.grad_key_sum, nullptr}, head);
            causal_key_gradients(p, head, span, scales.data, b);
            b.grad_sums.write(grad_past(p), head);
        });
}

inline void backward_causal_scan(const Problem &p, const CausalSpans &spans,
                                 const WeightGradients &trained) {
    const int64_t count = spans.count, most = scale_rows(spans.list[0]);  // no span is longer
    const ManySums grads(p, p.heads * count);
    const SharedMemory scales(p.heads * count * most * p.features);
    const auto scales_of = [&](int64_t i) { return scales.data + i * most * p.features; };
    trained.for_spans<CausalGradientBuffers>(
        spans.list, [&](auto &b, int64_t head, const Span &span, int64_t i) {
            spans.enter(i, b.sums);
            b.grad_sums.clear();
            causal_query_gradients(p, head, span, scales_of(i), true, b);
            grads.at(i).copy(b.grad_sums);
        });
    // What span i gave to the sums before it becomes the gradient of the sums after span i - 1.
    parallel(p, p.heads, [&](int64_t head) {
        auto b = in_scratch<CausalGradientBuffers>(p);
        b.grad_sums.read({p.call.grad_key_value, p.call.grad_key_sum, nullptr}, head);
        for (int64_t part = count - 1; part >= 0; --part) {
            const int64_t i = head * count + part, last = scale_rows(spans.list[part]) - 1;
            b.sums.copy(grads.at(i));
            grads.at(i).copy(b.grad_sums);
            pass_to_past(p, scales_of(i), scales_of(i) + last * p.features, false, b);
            b.grad_sums.add(b.sums);
        }
        b.grad_sums.write(grad_past(p), head);
    });
    trained.for_spans<CausalGradientBuffers>(
        spans.list, [&](auto &b, int64_t head, const Span &span, int64_t i) {
            b.grad_sums.copy(grads.at(i));
            causal_key_gradients(p, head, span, scales_of(i), b);
        });
}

inline void backward_causal(const Problem &p, const WeightGradients &trained) {
    const CausalSpans spans(p);
    if (spans.scan) return backward_causal_scan(p, spans, trained);
    backward_causal_sequences(p, spans, trained);
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
