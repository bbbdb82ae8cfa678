// How a call is cut into tasks, and what they share.
//
// A task is a head, or a packed sequence of a head. When heads are not a multiple of the threads
// (bidirectional calls) or fewer than them (causal ones, where it costs more), they are cut along
// the sequence: partial sums first, then for causal calls a scan over them, then the rows.
//
// Code compiled for an instruction set uses templates of the standard library only with types of
// its own: of others the linker keeps one copy, and it could be the one compiled for a processor
// that is not there.
#pragma once

#include <type_traits>
#include <vector>

#include "bidirectional_gradients.h"

namespace performers::PERFORMERS_ISA {
namespace {

// Positions that make it worth while to cut a head.
constexpr int64_t kSmallestPart = 4 * kBlock;

template <typename Body>
inline void parallel(const Problem &p, int64_t count, Body &&body) {
    parallel_for(
        p.call.threads, count,
        [](void *context, int64_t i) {
            const FlushDenormals flush;
            (*static_cast<std::remove_reference_t<Body> *>(context))(i);
        },
        &body);
}

inline Span all_positions(const performers_call &call) { return {0, call.length, 0, call.size}; }

// The packed sequences, or all positions at once.
inline std::vector<Span> sequences(const performers_call &call) {
    if (!call.segments) return {all_positions(call)};
    std::vector<Span> spans;
    int64_t begin = 0;
    for (int64_t i = 1; i <= call.size; ++i) {
        if (i == call.size || call.segments[i] != call.segments[begin]) {
            spans.push_back({begin, i, begin, i});
            begin = i;
        }
    }
    return spans;
}

// A sequence of `length` positions and `keys` keys as `parts` spans of whole blocks; the last ones
// may be empty.
inline std::vector<Span> cut(int64_t length, int64_t keys, int64_t parts) {
    const int64_t size = round_up((length + parts - 1) / parts, kBlock);
    std::vector<Span> spans;
    for (int64_t i = 0; i < parts; ++i) {
        spans.push_back({smaller(length, i * size), smaller(length, (i + 1) * size), 0, keys});
    }
    return spans;
}

inline int64_t parts_of(int64_t length, int64_t wanted) {
    return larger<int64_t>(1, smaller(wanted, length / kSmallestPart));
}

// The sequences, the same for every head, or parts of the only one if heads are fewer than threads.
inline std::vector<Span> sequences_or_parts(const Problem &p, int64_t wanted) {
    const std::vector<Span> whole = sequences(p.call);
    const int64_t parts = parts_of(p.call.length, wanted);
    if (whole.size() > 1 || p.heads >= p.call.threads || parts == 1) return whole;
    return cut(p.call.length, p.call.size, parts);
}

// Calls body(buffers, head, span, i) for the spans of all heads, in parallel; i counts them.
template <typename Made, typename Body>
inline void for_spans(const Problem &p, const std::vector<Span> &spans, Body &&body) {
    const int64_t count = static_cast<int64_t>(spans.size());
    parallel(p, p.heads * count, [&](int64_t i) {
        auto b = in_scratch<Made>(p);
        body(b, i / count, spans[static_cast<size_t>(i % count)], i);
    });
}

// Sums of many spans.
class ManySums {
public:
    ManySums(const Problem &p, int64_t count) : p_(p), memory_(count * Sums::size(p)) {}

    Sums at(int64_t i) const { return Sums(p_, memory_.data + i * Sums::size(p_)); }

private:
    const Problem &p_;
    SharedMemory memory_;
};

class Weights {
public:
    explicit Weights(Problem &p) : memory_(p.weight_rows() * p.weight_stride) {
        p.weights = memory_.data;
        constexpr int64_t some = 1024;  // fewer take less time than starting the threads
        parallel(p, (p.weight_rows() + some - 1) / some, [&](int64_t i) {
            const int64_t last = smaller((i + 1) * some, p.weight_rows());
            for (int64_t r = i * some; r < last; ++r) p.pack_weight(r);
        });
    }

private:
    SharedMemory memory_;
};

// The gradients of weights and bias, where they are wanted. Tasks that follow each other add to the
// same sums, and which do does not depend on how fast they run: so results do not either.
class WeightGradients {
public:
    explicit WeightGradients(const Problem &p)
        : p_(p),
          lanes_(p.call.grad_weight ? 2 * larger<int64_t>(1, p.call.threads) : 0),
          memory_(lanes_ * size()) {
        for (int64_t i = 0; i < lanes_ * size(); ++i) memory_.data[i] = 0;
    }

    // Calls body(buffers, head, span, i) as the function for_spans does; what the buffers find for the
    // weights is added to these gradients.
    template <typename Made, typename Body>
    void for_spans(const std::vector<Span> &spans, Body &&body) const {
        const int64_t count = static_cast<int64_t>(spans.size()), tasks = p_.heads * count;
        const int64_t lanes = lanes_ ? smaller(lanes_, tasks) : tasks;
        parallel(p_, lanes, [&](int64_t lane) {
            for (int64_t i = lane; i < tasks; i += lanes) {
                auto b = in_scratch<Made>(p_);
                b.inputs.trained = at(lane);
                body(b, i / count, spans[static_cast<size_t>(i % count)], i);
            }
        });
    }

    WeightSums at(int64_t lane) const {
        if (!lanes_) return {};
        float *weight = memory_.data + lane * size();
        return {weight, weight + p_.weight_rows() * p_.padded_dim};
    }

    // Writes the gradients.
    void finish() const {
        if (!lanes_) return;
        const float root = static_cast<float>(std::sqrt(p_.call.scale));
        for (int64_t r = 0; r < p_.weight_rows(); ++r) {
            float *row = p_.call.grad_weight + r * p_.head_dim;
            for (int64_t c = 0; c < p_.head_dim; ++c) {
                float sum = 0;
                for (int64_t i = 0; i < lanes_; ++i) sum += at(i).weight[r * p_.padded_dim + c];
                row[c] = sum * root;
            }
            p_.call.grad_bias[r] = 0;
            for (int64_t i = 0; i < lanes_; ++i) p_.call.grad_bias[r] += at(i).bias[r];
        }
    }

private:
    int64_t size() const { return round_up(p_.weight_rows() * (p_.padded_dim + 1), 16); }

    const Problem &p_;
    int64_t lanes_;
    SharedMemory memory_;
};

// The scale of sum i of a state. One that did not change stays the same number: converted to and fro at
// every step it would drift away from its sums.
inline float state_scale(const Problem &p, int64_t i, float log_scale) {
    const float *past = p.call.past.log_scale;
    return past && past[i] * kNatural == log_scale ? past[i] : log_scale * kLn2;
}

inline void export_state(const Problem &p, int64_t head, const Sums &sums) {
    sums.write(p.call.sums, head);
    for (int64_t i = head * p.features; p.call.sums.log_scale && i < (head + 1) * p.features; ++i) {
        p.call.sums.log_scale[i] = state_scale(p, i, p.call.sums.log_scale[i]);
    }
}

struct ForwardBuffers : Buffers {
    using Buffers::Buffers;

    KeyBuffers keys{arena, p};
    QueryBuffers queries{arena, p};
    Sums sums{arena, p};
};

}  // namespace
}  // namespace performers::PERFORMERS_ISA
