// Causal calls: heads, packed sequences, or parts of one sequence with a scan over their sums.
#pragma once

#include "causal_gradients.h"
#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The spans that a causal call is cut into, the same for every head. Packed sequences start afresh;
// the parts of one sequence each start from the sums before them.
struct CausalPlan {
    std::vector<Span> spans;
    bool scan;  // whether the spans are parts of one sequence, and more than one

    explicit CausalPlan(const Problem &p) : spans(sequences(p.call)), scan(false) {
        if (spans.size() > 1 || p.heads >= p.call.threads) return;
        const int64_t parts =
            parts_of(p.call.length, (p.call.threads + p.heads - 1) / p.heads);
        if (parts == 1) return;
        spans = cut(p.call.length, p.call.size, parts);
        scan = true;
    }

    int64_t count() const { return static_cast<int64_t>(spans.size()); }
    Span span(int64_t i) const { return spans[static_cast<size_t>(i % count())]; }
    bool is_last(int64_t i) const { return i % count() == count() - 1; }
};

// For a scan: the sums before every span of every head.
class EnteringSums {
public:
    EnteringSums(const Problem &p, const CausalPlan &plan)
        : p_(p), memory_(plan.scan ? p.heads * plan.count() * Sums::size(p) : 0) {
        if (!plan.scan) return;
        const int64_t count = plan.count();
        // The sums of span i first stand in the place of those that enter span i + 1.
        parallel(p, p.heads * (count - 1), [&](int64_t i) {
            auto b = in_scratch<ForwardBuffers>(p);
            const int64_t head = i / (count - 1), part = i % (count - 1);
            const Span span = plan.spans[static_cast<size_t>(part)];
            b.sums.clear(p);
            absorb(p, head, larger(span.first, span.begin + p.shift), span.end + p.shift, b.sums,
                   b.keys);
            at(head * count + part + 1).copy(p, b.sums);
        });
        parallel(p, p.heads, [&](int64_t head) {
            import_past(p, head, at(head * count));
            for (int64_t part = 1; part < count; ++part) {
                at(head * count + part).merge(p, at(head * count + part - 1));
            }
        });
    }

    Sums at(int64_t i) { return Sums(memory_.data() + i * Sums::size(p_), p_); }

private:
    const Problem &p_;
    SharedMemory memory_;
};

inline void forward_causal(const Problem &p) {
    const CausalPlan plan(p);
    EnteringSums entering(p, plan);
    const int64_t count = plan.count();
    parallel(p, p.heads * count, [&](int64_t i) {
        auto b = in_scratch<CausalBuffers>(p);
        const int64_t head = i / count;
        if (plan.scan) {
            b.sums.copy(p, entering.at(i));
        } else {
            import_past(p, head, b.sums);
        }
        causal_rows(p, head, plan.span(i), b.sums, b);
        if (plan.is_last(i)) export_state(p, head, b.sums);
    });
}

// The gradient of the sums after the last position, at their scales.
inline void import_final_gradient(const Problem &p, int64_t head, const Sums &grad_sums) {
    import_sums(p, grad_sums,
                p.call.grad_key_value ? p.call.grad_key_value + value_offset(p, head) : nullptr,
                p.call.grad_key_sum ? p.call.grad_key_sum + sum_offset(p, head) : nullptr, nullptr,
                kBinary);
}

inline void export_past_gradient(const Problem &p, int64_t head, const Sums &grad_sums) {
    if (!p.call.grad_past_key_value) return;
    export_sums(p, grad_sums, p.call.grad_past_key_value + value_offset(p, head),
                p.call.grad_past_key_sum + sum_offset(p, head), nullptr, kBinary);
}

inline int64_t scale_rows(Span span) { return (span.end - span.begin + kBlock - 1) / kBlock + 1; }

inline void backward_causal_sequences(const Problem &p, const CausalPlan &plan,
                                      const WeightGradients &trained) {
    const int64_t count = plan.count();
    trained.parallel_tasks(p.heads * count, [&](int64_t i, const WeightSums &sums) {
        const int64_t head = i / count;
        const Span span = plan.span(i);
        SharedMemory scales(scale_rows(span) * p.features);
        auto b = in_scratch<CausalGradientBuffers>(p);
        b.trained = sums;
        import_past(p, head, b.sums);
        causal_query_gradients(p, head, span, scales.data(), false, b);
        import_final_gradient(p, head, b.grad_sums);
        causal_key_gradients(p, head, span, scales.data(), b);
        if (!p.call.segments) export_past_gradient(p, head, b.grad_sums);
    });
}

inline void backward_causal_scan(const Problem &p, const CausalPlan &plan,
                                 const WeightGradients &trained) {
    const int64_t count = plan.count();
    EnteringSums entering(p, plan);
    SharedMemory grads(p.heads * count * Sums::size(p));
    const auto grad_at = [&](int64_t i) { return Sums(grads.data() + i * Sums::size(p), p); };
    const int64_t most = scale_rows(plan.spans[0]);  // no span is longer
    SharedMemory scales(p.heads * count * most * p.features);
    const auto scales_at = [&](int64_t i) { return scales.data() + i * most * p.features; };
    trained.parallel_tasks(p.heads * count, [&](int64_t i, const WeightSums &sums) {
        auto b = in_scratch<CausalGradientBuffers>(p);
        b.trained = sums;
        b.sums.copy(p, entering.at(i));
        b.grad_sums.clear(p);
        causal_query_gradients(p, i / count, plan.span(i), scales_at(i), true, b);
        grad_at(i).copy(p, b.grad_sums);
    });
    // What span i gave to the sums before it becomes the gradient of the sums after span i - 1.
    parallel(p, p.heads, [&](int64_t head) {
        auto b = in_scratch<CausalGradientBuffers>(p);
        import_final_gradient(p, head, b.grad_sums);
        for (int64_t part = count - 1; part >= 0; --part) {
            const int64_t i = head * count + part;
            const Sums mine = grad_at(i);
            b.sums.copy(p, mine);
            mine.copy(p, b.grad_sums);
            const Span span = plan.span(i);
            const float *before = scales_at(i);
            const float *after = before + (scale_rows(span) - 1) * p.features;
            pass_to_past(p, before, after, false, b);
            b.grad_sums.add(p, b.sums);
        }
        export_past_gradient(p, head, b.grad_sums);
    });
    trained.parallel_tasks(p.heads * count, [&](int64_t i, const WeightSums &sums) {
        auto b = in_scratch<CausalGradientBuffers>(p);
        b.trained = sums;
        b.grad_sums.copy(p, grad_at(i));
        causal_key_gradients(p, i / count, plan.span(i), scales_at(i), b);
    });
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
