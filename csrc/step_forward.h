// Causal attention of a single position: the step of a decoder. One pass over the running sums
// updates and reads them; the weights are used as they are, since packing them would cost more
// than the step.
#pragma once

#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct StepBuffers : Buffers {
    using Buffers::Buffers;

    float *x = arena.take(p.padded_dim), *value = arena.take(p.padded_value);
    float *key = arena.take(p.features), *query = arena.take(p.features);  // features
    float *decays = arena.take(p.features);  // what the past is multiplied with
    float *key_sum = arena.take(p.features), *log_scale = arena.take(p.features);  // after the step
    float *past_sum = arena.take(p.features), *past_scale = arena.take(p.features);  // before it
    QueryBuffers row{arena, p};
};

// W x sqrt(scale) + b in the units of exponents.
inline void project_one(const Problem &p, int64_t head, const float *x, float *to) {
    const float *weights = p.call.weight + p.weight_row(head) * p.head_dim;
    const float *bias = p.call.bias ? p.call.bias + p.weight_row(head) : nullptr;
    const float unit = p.exponential ? static_cast<float>(kLog2e) : 1.0f;
    const float root = static_cast<float>(std::sqrt(p.call.scale)) * unit;
    const int64_t whole = p.head_dim / kWidth * kWidth;
    for (int64_t f = 0; f < p.features; ++f) {
        const float *row = weights + f * p.head_dim;
        Vector sum = splat(0.0f);
        for (int64_t c = 0; c < whole; c += kWidth) sum += load(row + c) * load(x + c);
        float dot = total(sum);
        for (int64_t c = whole; c < p.head_dim; ++c) dot += row[c] * x[c];
        to[f] = dot * root + (bias ? bias[f] * unit : 0.0f);
    }
}

// The key's features at the scales after the step, and the sums of keys after it.
inline void step_key(const Problem &p, int64_t head, bool kept, StepBuffers &b) {
    const performers_sums &past = p.call.past;
    float norm = 0;
    if (kept) {
        read(p.rows(p.call.key, head), 0, p.head_dim, p.padded_dim, b.x);
        p.check(b.x, p.padded_dim);
        project_one(p, head, b.x, b.key);
        for (int64_t c = 0; c < p.head_dim; ++c) {
            const float x = b.x[c] * p.norm_root;
            norm += x * x;
        }
    }
    for (int64_t f = 0; f < p.features; ++f) {
        const int64_t at = head * p.features + f;
        b.past_sum[f] = past.key_sum ? past.key_sum[at] : 0.0f;
        b.past_scale[f] = past.log_scale ? past.log_scale[at] * kNatural : -kInfinity;
        b.decays[f] = 1;
        b.log_scale[f] = 0;
        if (p.exponential) {
            const float exponent = kept && norm < kInfinity ? b.key[f] - norm : -kInfinity;
            b.log_scale[f] = larger(b.past_scale[f], exponent);
            b.decays[f] = decay(b.past_scale[f], b.log_scale[f]);
            b.key[f] = exp2(exponent - finite(b.log_scale[f]));
        } else {
            b.key[f] = kept ? (b.key[f] < 0 ? 0.0f : b.key[f]) + p.epsilon : 0.0f;
        }
        b.key_sum[f] = b.past_sum[f] * b.decays[f] + b.key[f];
    }
}

// The query's features at the scales of the sums that it reads, divided by their largest; `scale` is
// that of the row. Returns the normaliser.
inline float step_query(const Problem &p, int64_t head, int64_t group, const float *log_scale,
                        const float *key_sum, float &scale, StepBuffers &b) {
    read(p.rows(p.call.query, head, group), 0, p.head_dim, p.padded_dim, b.x);
    p.check(b.x, p.padded_dim);
    project_one(p, head, b.x, b.query);
    scale = p.exponential ? kLowest : 0.0f;
    for (int64_t f = 0; p.exponential && f < p.features; ++f) {
        b.query[f] += log_scale[f];
        scale = b.query[f] > scale ? b.query[f] : scale;
    }
    float normaliser = 0;
    for (int64_t f = 0; f < p.features; ++f) {
        b.query[f] = p.exponential ? exp2(b.query[f] - scale)
                                   : (b.query[f] < 0 ? 0.0f : b.query[f]) + p.epsilon;
        normaliser += b.query[f] * key_sum[f];
    }
    return normaliser;
}

template <typename Number>
inline Number number_at(const float *from) {
    Number x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// The columns of kCount numbers, vectors or single ones, from `begin` on; the sums are read once.
template <typename Number, int kCount, bool kStrict>
inline void step_columns(const Problem &p, int64_t begin, const float *past, float *next,
                         StepBuffers &b) {
    constexpr int64_t kSize = sizeof(Number) / sizeof(float);
    Number value[kCount], out[kCount];
    for (int v = 0; v < kCount; ++v) {
        value[v] = number_at<Number>(b.value + begin + v * kSize);
        out[v] = Number{};
    }
    for (int64_t f = 0; f < p.features; ++f) {
        const float phi = b.key[f], factor = b.decays[f], query = b.query[f];
        const int64_t at = f * p.value_dim + begin;
        for (int v = 0; v < kCount; ++v) {
            Number row = phi * value[v], before = Number{};
            if (past) {
                before = number_at<Number>(past + at + v * kSize);
                row += before * factor;
            }
            if (next) std::memcpy(next + at + v * kSize, &row, sizeof row);
            out[v] += (kStrict ? before : row) * query;
        }
    }
    std::memcpy(b.row.out + begin, out, sizeof out);
}

template <bool kStrict>
inline void step_values(const Problem &p, const float *past, float *next, StepBuffers &b) {
    int64_t c = 0;
    for (; c + 4 * kWidth <= p.value_dim; c += 4 * kWidth) {
        step_columns<Vector, 4, kStrict>(p, c, past, next, b);
    }
    for (; c + kWidth <= p.value_dim; c += kWidth) {
        step_columns<Vector, 1, kStrict>(p, c, past, next, b);
    }
    for (; c < p.value_dim; ++c) step_columns<float, 1, kStrict>(p, c, past, next, b);
}

inline void step(const Problem &p, int64_t head, StepBuffers &b) {
    const uint8_t *mask = p.mask(head);
    const bool kept = p.shift == 0 && (!mask || mask[0]);
    read(p.rows(p.call.value, head), 0, kept ? p.value_dim : 0, p.padded_value, b.value);
    p.check(b.value, p.padded_value);
    step_key(p, head, kept, b);
    bool raised = false;
    for (int64_t f = 0; p.strict && f < p.features; ++f) raised |= b.decays[f] != 1;
    const performers_sums &past = p.call.past, &sums = p.call.sums;
    const int64_t at = head * p.features;
    const float *before = past.key_value ? past.key_value + at * p.value_dim : nullptr;
    float *next = sums.key_value ? sums.key_value + at * p.value_dim : nullptr;
    QueryBuffers &row = b.row;
    for (int64_t group = 0; group < p.call.groups; ++group) {
        // Rows are computed by vectors: those beyond the first are none.
        for (int64_t r = 1; r < kWidth; ++r) row.normaliser[r] = row.scale[r] = 0;
        row.normaliser[0] = step_query(p, head, group, p.strict ? b.past_scale : b.log_scale,
                                       p.strict ? b.past_sum : b.key_sum, row.scale[0], b);
        row.block.rows = 1;
        (p.strict ? step_values<true> : step_values<false>)(p, before, next, b);
        if (p.exact) {
            row.block.load_queries(p.rows(p.call.query, head, group), 0, 1);
            exact_sums(p, head, {0, 1, 0, p.call.size}, 0, row);
            add_exact(p, row);
        }
        // Below zero where the row stands at the scale of sums that its key has not raised: the
        // backward pass would take the scale after it.
        if (p.strict && raised) row.normaliser[0] = -row.normaliser[0];
        finish_rows(p, head, group, 0, row);
    }
    if (!next) return;
    for (int64_t f = 0; f < p.features; ++f) {
        sums.key_sum[at + f] = b.key_sum[f];
        sums.log_scale[at + f] = state_scale(p, at + f, b.log_scale[f]);
    }
}

inline void forward_step(const Problem &p) {
    parallel(p, p.heads, [&](int64_t head) {
        auto b = in_scratch<StepBuffers>(p);
        step(p, head, b);
    });
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
