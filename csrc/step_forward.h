// Causal attention of a single position: the step of a decoder. One pass over the running sums
// updates and reads them; the weights are used as they are, since packing them would cost more
// than the step.
#pragma once

#include "tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

struct StepBuffers : Buffers {
    using Buffers::Buffers;

    float *x = arena.take(p.padded_dim);  // (padded_dim)
    float *value = arena.take(p.padded_value);  // (padded_value)
    float *key = arena.take(p.features);  // features of the key (features)
    float *query = arena.take(p.features);  // of the query
    float *decays = arena.take(p.features);  // what the past is multiplied with
    float *key_sum = arena.take(p.features), *log_scale = arena.take(p.features);  // after the step
    float *past_sum = arena.take(p.features), *past_scale = arena.take(p.features);  // before it
    float *out = arena.take(p.padded_value);  // (padded_value)
    // of the row; beside exact pairs as for a block of rows
    float *scale = arena.take(kBlock), *normaliser = arena.take(kBlock);
    Block block{arena, p};
    ExactBuffers exact{arena, p};
};

// W x sqrt(scale) + b in the units of exponents.
inline void project_one(const Problem &p, int64_t head, const float *x, float *to) {
    const int64_t which = p.call.weight_heads == 1 ? 0 : p.key_head_of(head);
    const float *weights = p.call.weight + which * p.features * p.head_dim;
    const float *bias = p.call.bias ? p.call.bias + which * p.features : nullptr;
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
    const float *past_sum =
        p.call.past_key_sum ? p.call.past_key_sum + sum_offset(p, head) : nullptr;
    const float *past_scale =
        p.call.past_log_scale ? p.call.past_log_scale + sum_offset(p, head) : nullptr;
    float norm = 0;
    if (kept) {
        read(p.key_rows(p.call.key, head), 0, p.head_dim, p.padded_dim, b.x);
        p.check(b.x, p.padded_dim);
        project_one(p, head, b.x, b.key);
        for (int64_t c = 0; c < p.head_dim; ++c) {
            const float x = b.x[c] * p.norm_root;
            norm += x * x;
        }
    }
    for (int64_t f = 0; f < p.features; ++f) {
        b.past_sum[f] = past_sum ? past_sum[f] : 0.0f;
        b.past_scale[f] = past_scale ? past_scale[f] * static_cast<float>(kLog2e) : -kInfinity;
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
    read(p.query_rows(p.call.query, head, group), 0, p.head_dim, p.padded_dim, b.x);
    p.check(b.x, p.padded_dim);
    project_one(p, head, b.x, b.query);
    scale = 0;
    if (p.exponential) {
        scale = kLowest;
        for (int64_t f = 0; f < p.features; ++f) {
            b.query[f] += log_scale[f];
            scale = b.query[f] > scale ? b.query[f] : scale;
        }
    }
    float normaliser = 0;
    for (int64_t f = 0; f < p.features; ++f) {
        b.query[f] = p.exponential ? exp2(b.query[f] - scale)
                                   : (b.query[f] < 0 ? 0.0f : b.query[f]) + p.epsilon;
        normaliser += b.query[f] * key_sum[f];
    }
    return normaliser;
}

// The columns [begin, begin + kVectors vectors) of all groups; the sums are read once for each.
template <int kVectors, bool kStrict>
inline void step_columns(const Problem &p, int64_t begin, const float *past, float *next,
                         StepBuffers &b) {
    Vector value[kVectors], out[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        value[v] = load(b.value + begin + v * kWidth);
        out[v] = splat(0.0f);
    }
    for (int64_t f = 0; f < p.features; ++f) {
        const Vector phi = splat(b.key[f]), factor = splat(b.decays[f]), query = splat(b.query[f]);
        const int64_t at = f * p.value_dim + begin;
        for (int v = 0; v < kVectors; ++v) {
            Vector row = phi * value[v], before = splat(0.0f);
            if (past) {
                before = load(past + at + v * kWidth);
                row += before * factor;
            }
            if (next) store(next + at + v * kWidth, row);
            out[v] += (kStrict ? before : row) * query;
        }
    }
    for (int v = 0; v < kVectors; ++v) store(b.out + begin + v * kWidth, out[v]);
}

inline void step_column(const Problem &p, int64_t c, const float *past, float *next,
                        StepBuffers &b) {
    float out = 0;
    for (int64_t f = 0; f < p.features; ++f) {
        const int64_t at = f * p.value_dim + c;
        const float before = past ? past[at] : 0.0f;
        const float row = b.key[f] * b.value[c] + before * b.decays[f];
        if (next) next[at] = row;
        out += (p.strict ? before : row) * b.query[f];
    }
    b.out[c] = out;
}

// The exact pairs of the query, with what the features gave.
inline void step_exact(const Problem &p, int64_t head, int64_t group, StepBuffers &b) {
    for (int64_t r = 1; r < kWidth; ++r) b.normaliser[r] = b.scale[r] = 0;
    b.block.load_queries(p, p.query_rows(p.call.query, head, group), 0, 1);
    exact_sums(p, head, {0, 1, 0, p.call.size}, 0, b.block, b.exact);
    add_exact(p, 1, b.exact, b.out, b.scale, b.normaliser);
}

inline void step(const Problem &p, int64_t head, StepBuffers &b) {
    const uint8_t *mask = p.mask(head);
    const bool kept = p.shift == 0 && (!mask || mask[0]);
    for (int64_t c = 0; c < p.padded_value; ++c) b.value[c] = 0;
    if (kept) read(p.key_rows(p.call.value, head), 0, p.value_dim, p.padded_value, b.value);
    p.check(b.value, p.padded_value);
    step_key(p, head, kept, b);
    const int64_t sums = sum_offset(p, head), values = value_offset(p, head);
    bool raised = false;
    for (int64_t f = 0; p.strict && f < p.features; ++f) raised |= b.decays[f] != 1;
    const float *past = p.call.past_key_value ? p.call.past_key_value + values : nullptr;
    float *next = p.call.key_value ? p.call.key_value + values : nullptr;
    for (int64_t group = 0; group < p.call.groups; ++group) {
        b.normaliser[0] = step_query(p, head, group, p.strict ? b.past_scale : b.log_scale,
                                     p.strict ? b.past_sum : b.key_sum, b.scale[0], b);
        const auto columns = [&]<int kVectors>(int64_t c) {
            if (p.strict) {
                step_columns<kVectors, true>(p, c, past, next, b);
            } else {
                step_columns<kVectors, false>(p, c, past, next, b);
            }
        };
        int64_t c = 0;
        for (; c + 4 * kWidth <= p.value_dim; c += 4 * kWidth) columns.template operator()<4>(c);
        for (; c + kWidth <= p.value_dim; c += kWidth) columns.template operator()<1>(c);
        for (; c < p.value_dim; ++c) step_column(p, c, past, next, b);
        if (p.exact) step_exact(p, head, group, b);
        float inverse = inverse_of(b.normaliser[0]);
        for (int64_t i = 0; i < p.value_dim; ++i) b.out[i] *= inverse;
        write(p.query_rows(p.call.out, head, group), 0, p.value_dim, b.out);
        p.call.row_scale[p.row_index(head, group, 0)] = b.scale[0];
        // The row stands at the scale of sums that its key has not raised, where the backward pass
        // would take the scale after it.
        if (p.strict && raised) inverse = -inverse;
        p.call.row_inverse[p.row_index(head, group, 0)] = inverse;
    }
    if (!next) return;
    for (int64_t f = 0; f < p.features; ++f) {
        p.call.key_sum[sums + f] = b.key_sum[f];
        // A scale that did not change stays the same number, or it would drift from its sums.
        const bool changed = b.decays[f] != 1 || !p.call.past_log_scale;
        p.call.log_scale[sums + f] =
            changed ? b.log_scale[f] * (p.exponential ? kLn2 : 1.0f) : p.call.past_log_scale[sums + f];
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
