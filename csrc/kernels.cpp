// How a call is cut into tasks. Compiled once for every instruction set.
//
// A task is a head, or a packed sequence of a head. When there are fewer of them than threads, or
// not a multiple, heads are cut along the sequence: partial sums first, then (for causal calls) a
// scan over them, then the rows.
//
// Nothing here may instantiate a library template with library types only: the linker keeps one
// copy of such code, and it could be the one compiled for a processor that is not there.
#include "kernels.h"

#include <type_traits>
#include <vector>

#include "causal_gradients.h"
#include "step.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Positions that make it worth while to cut a head.
constexpr int64_t kSmallestPart = 4 * kBlock;

template <typename Body>
void parallel(const Problem &p, int64_t count, Body &&body) {
    parallel_for(
        p.call.threads, count,
        [](void *context, int64_t i) {
            const FlushDenormals flush;
            (*static_cast<std::remove_reference_t<Body> *>(context))(i);
        },
        &body);
}

// Floats for the duration of a call, shared by its tasks.
class SharedMemory {
public:
    explicit SharedMemory(int64_t count) : data_(allocate(static_cast<size_t>(count))) {}
    ~SharedMemory() { release(data_); }
    SharedMemory(const SharedMemory &) = delete;
    SharedMemory &operator=(const SharedMemory &) = delete;

    float *data() const { return data_; }

private:
    float *data_;
};

struct Span {
    int64_t begin, end;
};

// The packed sequences, or all positions at once.
std::vector<Span> sequences(const performers_call &call) {
    if (!call.segments) return {{0, call.size}};
    std::vector<Span> spans;
    int64_t begin = 0;
    for (int64_t i = 1; i <= call.size; ++i) {
        if (i == call.size || call.segments[i] != call.segments[begin]) {
            spans.push_back({begin, i});
            begin = i;
        }
    }
    return spans;
}

// `parts` spans of whole blocks; the last ones may be empty.
std::vector<Span> cut(int64_t length, int64_t parts) {
    const int64_t size = round_up((length + parts - 1) / parts, kBlock);
    std::vector<Span> spans;
    for (int64_t i = 0; i < parts; ++i) {
        spans.push_back({std::min(length, i * size), std::min(length, (i + 1) * size)});
    }
    return spans;
}

int64_t parts_of(const Problem &p, int64_t length, int64_t wanted) {
    return std::max<int64_t>(1, std::min(wanted, length / kSmallestPart));
}

class Weights {
public:
    explicit Weights(Problem &p) : memory_(p.weight_rows() * p.weight_stride) {
        p.weights = memory_.data();
        constexpr int64_t some = 64;
        parallel(p, (p.weight_rows() + some - 1) / some, [&](int64_t i) {
            const int64_t last = std::min((i + 1) * some, p.weight_rows());
            for (int64_t r = i * some; r < last; ++r) p.pack_weight(r);
        });
    }

private:
    SharedMemory memory_;
};

// Where the sums of a head lie in the tensors of a call.
int64_t value_offset(const Problem &p, int64_t head) { return head * p.features * p.value_dim; }
int64_t sum_offset(const Problem &p, int64_t head) { return head * p.features; }

constexpr float kBinary = 1.0f, kNatural = static_cast<float>(kLog2e);

// The sums that a bidirectional call leaves for its backward pass.
void export_bidirectional(const Problem &p, int64_t head, const Sums &sums) {
    export_sums(p, sums, p.call.key_value + value_offset(p, head),
                p.call.key_sum + sum_offset(p, head), p.call.log_scale + sum_offset(p, head),
                kBinary);
}

void import_bidirectional(const Problem &p, int64_t head, const Sums &sums) {
    import_sums(p, sums, p.call.key_value + value_offset(p, head),
                p.call.key_sum + sum_offset(p, head), p.call.log_scale + sum_offset(p, head),
                kBinary);
}

// A state's log scales are natural logarithms.
void import_past(const Problem &p, int64_t head, const Sums &sums) {
    if (!p.call.past_key_value) return sums.clear(p);
    import_sums(p, sums, p.call.past_key_value + value_offset(p, head),
                p.call.past_key_sum + sum_offset(p, head),
                p.call.past_log_scale + sum_offset(p, head), kNatural);
}

void export_state(const Problem &p, int64_t head, const Sums &sums) {
    if (!p.call.key_value) return;
    float *log_scale = p.call.log_scale + sum_offset(p, head);
    export_sums(p, sums, p.call.key_value + value_offset(p, head),
                p.call.key_sum + sum_offset(p, head), log_scale, p.exponential ? kLn2 : kBinary);
    if (!p.call.past_log_scale) return;
    // A scale that did not change stays the same number: converted to and fro at every step it
    // would drift away from its sums.
    const float *past = p.call.past_log_scale + sum_offset(p, head);
    for (int64_t f = 0; f < p.features; ++f) {
        if (past[f] * kNatural == sums.log_scale[f]) log_scale[f] = past[f];
    }
}

struct ForwardBuffers {
    KeyBuffers keys;
    QueryBuffers queries;
    Sums sums;

    ForwardBuffers(Arena &arena, const Problem &p)
        : keys(arena, p), queries(arena, p), sums(arena.take(Sums::size(p)), p) {}
};

void forward_packed(const Problem &p) {
    const std::vector<Span> spans = sequences(p.call);
    const int64_t count = static_cast<int64_t>(spans.size());
    parallel(p, p.heads * count, [&](int64_t i) {
        const Span span = spans[static_cast<size_t>(i % count)];
        auto b = in_scratch<ForwardBuffers>(p);
        b.sums.clear(p);
        absorb(p, i / count, span.begin, span.end, b.sums, b.keys);
        read_out(p, i / count, span.begin, span.end, b.sums, b.queries);
    });
}

// Tasks for each head of a bidirectional call: one if that keeps all threads busy.
int64_t bidirectional_parts(const Problem &p, int64_t length) {
    const int64_t threads = std::max<int64_t>(1, p.call.threads);
    if (p.heads % threads == 0) return 1;
    return parts_of(p, length, (4 * threads + p.heads - 1) / p.heads);
}

void forward_bidirectional(const Problem &p) {
    const int64_t key_parts = bidirectional_parts(p, p.call.size);
    const int64_t query_parts = bidirectional_parts(p, p.call.length);
    if (key_parts == 1 && query_parts == 1) {
        return parallel(p, p.heads, [&](int64_t head) {
            auto b = in_scratch<ForwardBuffers>(p);
            b.sums.clear(p);
            absorb(p, head, 0, p.call.size, b.sums, b.keys);
            export_bidirectional(p, head, b.sums);
            read_out(p, head, 0, p.call.length, b.sums, b.queries);
        });
    }
    SharedMemory memory(p.heads * key_parts * Sums::size(p));
    const std::vector<Span> keys = cut(p.call.size, key_parts);
    const std::vector<Span> queries = cut(p.call.length, query_parts);
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
        read_out(p, i / query_parts, span.begin, span.end, b.sums, b.queries);
    });
}

struct BackwardBuffers {
    KeyBuffers forward_keys;
    QueryGradientBuffers queries;
    KeyGradientBuffers keys;
    Sums sums, grad_sums;

    BackwardBuffers(Arena &arena, const Problem &p)
        : forward_keys(arena, p),
          queries(arena, p),
          keys(arena, p),
          sums(arena.take(Sums::size(p)), p),
          grad_sums(arena.take(Sums::size(p)), p) {}
};

void backward_packed(const Problem &p) {
    const std::vector<Span> spans = sequences(p.call);
    const int64_t count = static_cast<int64_t>(spans.size());
    parallel(p, p.heads * count, [&](int64_t i) {
        const int64_t head = i / count;
        const Span span = spans[static_cast<size_t>(i % count)];
        auto b = in_scratch<BackwardBuffers>(p);
        b.sums.clear(p);
        b.grad_sums.clear(p);
        // Keeping the sums of every short sequence would take more memory than the sequence.
        absorb(p, head, span.begin, span.end, b.sums, b.forward_keys);
        query_gradients(p, head, span.begin, span.end, b.sums, b.grad_sums, b.queries);
        key_gradients(p, head, span.begin, span.end, b.sums, b.grad_sums, b.keys);
    });
}

void backward_bidirectional(const Problem &p) {
    const int64_t key_parts = bidirectional_parts(p, p.call.size);
    const int64_t query_parts = bidirectional_parts(p, p.call.length);
    if (key_parts == 1 && query_parts == 1) {
        return parallel(p, p.heads, [&](int64_t head) {
            auto b = in_scratch<BackwardBuffers>(p);
            import_bidirectional(p, head, b.sums);
            b.grad_sums.clear(p);
            query_gradients(p, head, 0, p.call.length, b.sums, b.grad_sums, b.queries);
            key_gradients(p, head, 0, p.call.size, b.sums, b.grad_sums, b.keys);
        });
    }
    SharedMemory memory(p.heads * query_parts * Sums::size(p));
    const std::vector<Span> keys = cut(p.call.size, key_parts);
    const std::vector<Span> queries = cut(p.call.length, query_parts);
    const auto partial = [&](int64_t i) { return Sums(memory.data() + i * Sums::size(p), p); };
    parallel(p, p.heads * query_parts, [&](int64_t i) {
        auto b = in_scratch<BackwardBuffers>(p);
        const Span span = queries[static_cast<size_t>(i % query_parts)];
        import_bidirectional(p, i / query_parts, b.sums);
        b.grad_sums.clear(p);
        query_gradients(p, i / query_parts, span.begin, span.end, b.sums, b.grad_sums, b.queries);
        partial(i).copy(p, b.grad_sums);
    });
    parallel(p, p.heads * key_parts, [&](int64_t i) {
        auto b = in_scratch<BackwardBuffers>(p);
        const int64_t head = i / key_parts;
        const Span span = keys[static_cast<size_t>(i % key_parts)];
        import_bidirectional(p, head, b.sums);
        b.grad_sums.copy(p, partial(head * query_parts));
        for (int64_t part = 1; part < query_parts; ++part) {
            const Sums more = partial(head * query_parts + part);
            for (int64_t k = 0; k < p.features * (p.padded_value + 1); ++k) {
                b.grad_sums.key_value[k] += more.key_value[k];
            }
        }
        key_gradients(p, head, span.begin, span.end, b.sums, b.grad_sums, b.keys);
    });
}

// The spans that a causal call is cut into, the same for every head. Packed sequences start afresh;
// the parts of one sequence each start from the sums before them.
struct CausalPlan {
    std::vector<Span> spans;
    bool scan;  // whether the spans are parts of one sequence, and more than one

    explicit CausalPlan(const Problem &p) : spans(sequences(p.call)), scan(false) {
        if (spans.size() > 1 || p.heads >= p.call.threads) return;
        const int64_t parts =
            parts_of(p, p.call.length, (p.call.threads + p.heads - 1) / p.heads);
        if (parts == 1) return;
        spans = cut(p.call.length, parts);
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
            absorb(p, head, span.begin, span.end, b.sums, b.keys);
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

void forward_causal(const Problem &p) {
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
        causal_rows(p, head, plan.span(i).begin, plan.span(i).end, b.sums, b);
        if (plan.is_last(i)) export_state(p, head, b.sums);
    });
}

// The gradient of the sums after the last position, at their scales.
void import_final_gradient(const Problem &p, int64_t head, const Sums &grad_sums) {
    import_sums(p, grad_sums,
                p.call.grad_key_value ? p.call.grad_key_value + value_offset(p, head) : nullptr,
                p.call.grad_key_sum ? p.call.grad_key_sum + sum_offset(p, head) : nullptr, nullptr,
                kBinary);
}

void export_past_gradient(const Problem &p, int64_t head, const Sums &grad_sums) {
    if (!p.call.grad_past_key_value) return;
    export_sums(p, grad_sums, p.call.grad_past_key_value + value_offset(p, head),
                p.call.grad_past_key_sum + sum_offset(p, head), nullptr, kBinary);
}

int64_t scale_rows(Span span) { return (span.end - span.begin + kBlock - 1) / kBlock + 1; }

void backward_causal_sequences(const Problem &p, const CausalPlan &plan) {
    const int64_t count = plan.count();
    parallel(p, p.heads * count, [&](int64_t i) {
        const int64_t head = i / count;
        const Span span = plan.span(i);
        SharedMemory scales(scale_rows(span) * p.features);
        auto b = in_scratch<CausalGradientBuffers>(p);
        import_past(p, head, b.sums);
        causal_query_gradients(p, head, span.begin, span.end, scales.data(), false, b);
        import_final_gradient(p, head, b.grad_sums);
        causal_key_gradients(p, head, span.begin, span.end, scales.data(), b);
        if (!p.call.segments) export_past_gradient(p, head, b.grad_sums);
    });
}

void backward_causal_scan(const Problem &p, const CausalPlan &plan) {
    const int64_t count = plan.count();
    EnteringSums entering(p, plan);
    SharedMemory grads(p.heads * count * Sums::size(p));
    const auto grad_at = [&](int64_t i) { return Sums(grads.data() + i * Sums::size(p), p); };
    const int64_t most = scale_rows(plan.spans[0]);  // no span is longer
    SharedMemory scales(p.heads * count * most * p.features);
    const auto scales_at = [&](int64_t i) { return scales.data() + i * most * p.features; };
    parallel(p, p.heads * count, [&](int64_t i) {
        auto b = in_scratch<CausalGradientBuffers>(p);
        b.sums.copy(p, entering.at(i));
        b.grad_sums.clear(p);
        causal_query_gradients(p, i / count, plan.span(i).begin, plan.span(i).end, scales_at(i),
                               true, b);
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
            for (int64_t k = 0; k < p.features * (p.padded_value + 1); ++k) {
                b.grad_sums.key_value[k] += b.sums.key_value[k];
            }
        }
        export_past_gradient(p, head, b.grad_sums);
    });
    parallel(p, p.heads * count, [&](int64_t i) {
        auto b = in_scratch<CausalGradientBuffers>(p);
        b.grad_sums.copy(p, grad_at(i));
        causal_key_gradients(p, i / count, plan.span(i).begin, plan.span(i).end, scales_at(i), b);
    });
}

void forward_step(const Problem &p) {
    parallel(p, p.heads, [&](int64_t head) {
        auto b = in_scratch<StepBuffers>(p);
        step(p, head, b);
    });
}

void forward(const performers_call &call) {
    Problem p(call);
    if (call.causal && call.length == 1) return forward_step(p);
    const Weights weights(p);
    if (call.causal) return forward_causal(p);
    if (call.segments) return forward_packed(p);
    forward_bidirectional(p);
}

void backward(const performers_call &call) {
    Problem p(call);
    const Weights weights(p);
    if (call.causal) {
        const CausalPlan plan(p);
        return plan.scan ? backward_causal_scan(p, plan) : backward_causal_sequences(p, plan);
    }
    if (call.segments) return backward_packed(p);
    backward_bidirectional(p);
}

}  // namespace

const Kernels kernels = {forward, backward};

}  // namespace performers::PERFORMERS_ISA
