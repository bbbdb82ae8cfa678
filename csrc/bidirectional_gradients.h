// Gradients, from a block of output gradients to those of its rows. Features are computed again,
// panel by panel, at the scales that the forward pass left behind.
#pragma once

#include "bidirectional_forward.h"

namespace performers::PERFORMERS_ISA {
namespace {

// A block of queries as the backward pass sees it: their output gradients, and for each row
// delta = grad . out, the row's scale and its inverse normaliser.
struct QueryGradientBlock : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    float *grad = arena.take(kBlock * p.padded_value);
    float *grad_transposed = arena.take(p.padded_value * kBlock);
    float *out = arena.take(larger(p.padded_value, kBlock)), *delta = arena.take(kBlock);
    float *scale = arena.take(kBlock), *inverse = arena.take(kBlock);
    // beside exact pairs: of the row, where `scale` is that of its features
    float *whole_scale = arena.take(kBlock);

    // The output gradients alone.
    void fetch_grad(const Problem &p, int64_t head, int64_t group, int64_t begin, int64_t rows) {
        load_values(p, p.query_rows(p.call.grad_out, head, group), begin, rows, nullptr, grad);
        transpose(grad, p.padded_value, rows, p.padded_value, grad_transposed);
    }

    void fetch(const Problem &p, int64_t head, int64_t group, int64_t begin, int64_t rows) {
        block.load_queries(p, p.query_rows(p.call.query, head, group), begin, rows);
        fetch_grad(p, head, group, begin, rows);
        const Rows outputs = p.query_rows(p.call.out, head, group);
        const int64_t index = p.row_index(head, group, begin);
        for (int64_t r = 0; r < round_up(rows, kWidth); ++r) {
            delta[r] = scale[r] = inverse[r] = 0;
            if (r >= rows) continue;
            read(outputs, begin + r, p.value_dim, p.padded_value, out);
            Vector sum = splat(0.0f);
            for (int64_t c = 0; c < p.padded_value; c += kWidth) {
                sum += load(out + c) *
                       load(grad + r * p.padded_value + c);
            }
            delta[r] = total(sum);
            if (p.call.grad_log_normaliser) delta[r] -= p.call.grad_log_normaliser[index + r];
            scale[r] = p.call.row_scale[index + r];
            inverse[r] = p.call.row_inverse[index + r];
        }
        if (!p.exact) return;
        block.offsets(p, out);
        for (int64_t r = 0; r < round_up(rows, kWidth); ++r) {
            whole_scale[r] = scale[r];
            scale[r] -= out[r];
        }
    }
};

// d loss / d (normalised pair), (keys, kBlock): grad_i . v_j - delta_i within the band, else zero.
inline void pair_gradients(const Problem &p, int64_t keys, int64_t rows, const float *value,
                           const float *grad_transposed, const float *delta, Band band, float *to) {
    multiply_band(keys, rows, p.value_dim, rows_of(value, p.padded_value), grad_transposed, kBlock,
                  to, kBlock, band);
    for (int64_t t = 0; t < keys; ++t) {
        const int64_t first = larger<int64_t>(0, t - band.high) / kWidth * kWidth;
        for (int64_t r = first; r < rows; r += kWidth) {
            store(to + t * kBlock + r, load(to + t * kBlock + r) - load(delta + r));
        }
    }
    clear_outside(to, keys, rows, band);
}

// 2^(x + scale - row_scale) / normaliser. The power is at most one but for rows that are exact: those
// have a scale of their own, at which it could overflow, and an inverse of zero here.
inline Vector normalised_feature(Vector x, Vector scale, Vector row_scale, Vector inverse) {
    return exp2(minimum(splat(1.0f), x + scale - row_scale)) * inverse;
}

// Sums of the gradients of weights over the rows that one task after the other sees; nothing when
// nobody wants them.
struct WeightSums {
    float *weight = nullptr;  // (weight_heads, features, padded_dim), in units of sqrt(scale)
    float *bias = nullptr;    // (weight_heads, features)

    // Adds those of features [first, first + count), from the slopes (count, kBlock) of exponents, or
    // of projections, of a block of rows.
    void add(const Problem &p, int64_t head, int64_t first, int64_t count, const float *slope,
             const Block &block) const {
        if (!weight) return;
        const int64_t which = p.call.weight_heads == 1 ? 0 : p.key_head_of(head);
        const int64_t row = which * p.features + first;
        multiply(count, p.padded_dim, block.rows, rows_of(slope, kBlock), block.x, p.padded_dim,
                 weight + row * p.padded_dim, p.padded_dim, true);
        for (int64_t f = 0; f < count; ++f) {
            // What lies beyond the block's rows is left over from others.
            const float *at = slope + f * kBlock;
            Vector sum = splat(0.0f);
            int64_t r = 0;
            for (; r + kWidth <= block.rows; r += kWidth) sum += load(at + r);
            float rest = total(sum);
            for (; r < block.rows; ++r) rest += at[r];
            bias[row + f] += rest;
        }
    }
};

// For `count` features from `first` on: projections of queries become normalised features, in
// place, and `slope` (the gradient of what a feature is multiplied with) that of the projection.
// Rows whose inverse normaliser is not positive get zeros. Adds to the gradient of the key sums,
// unless that is null.
inline void query_slopes(const Problem &p, const QueryGradientBlock &q, const Sums &sums,
                         int64_t first, int64_t count, float *features, float *slope,
                         float *grad_key_sum) {
    const Vector zero = splat(0.0f), epsilon = splat(p.epsilon);
    for (int64_t f = 0; f < count; ++f) {
        const Vector scale = splat(sums.log_scale[first + f]);
        const Vector key_sum = splat(sums.key_sum[first + f]);
        Vector lost = zero;
        for (int64_t r = 0; r < q.block.rows; r += kWidth) {
            float *at = features + f * kBlock + r, *slope_at = slope + f * kBlock + r;
            const Vector delta = load(q.delta + r), x = load(at);
            const Vector inverse = maximum(zero, load(q.inverse + r));
            const Vector towards = load(slope_at) - delta * key_sum;
            Vector phi, grad;
            if (p.exponential) {
                phi = normalised_feature(x, scale, load(q.scale + r), inverse);
                grad = phi * towards;
            } else {
                phi = (maximum(zero, x) + epsilon) * inverse;
                grad = x > zero ? towards * inverse : zero;
            }
            store(at, phi);
            store(slope_at, grad);
            lost += phi * delta;
        }
        if (grad_key_sum) grad_key_sum[first + f] -= total(lost);
    }
}

struct QueryGradientBuffers : Buffers {
    using Buffers::Buffers;

    QueryGradientBlock q{arena, p};
    float *features = arena.take(kPanel * kBlock), *slope = arena.take(kPanel * kBlock);
    float *slope_sum = arena.take(kBlock), *grad_x = arena.take(kBlock * p.padded_dim);
    WeightSums trained;
};

inline float *float_row(const Rows &rows, int64_t r) {
    return reinterpret_cast<float *>(rows.row(r));
}

// Beside exact pairs, which have a share of their own in it, a gradient is added to what is there.
inline void write_gradient(const Problem &p, const Rows &to, int64_t r, int64_t width, float *row) {
    if (p.exact) {
        const float *there = float_row(to, r);
        for (int64_t c = 0; c < width; ++c) row[c] += there[c];
    }
    write(to, r, width, row);
}

// What a gradient with respect to a projection is multiplied with, besides the packed weights.
inline float projection_unit(const Problem &p) { return p.exponential ? kLn2 : 1.0f; }

// grad_x (rows, padded_dim) of slopes already multiplied with the packed weights becomes the gradient
// of a block of rows, from row `begin` of `to` on, and is written out. What the norm of x gives is
// taken from the sums of slopes, unless these are null. Rows before `first` are left out.
inline void finish_gradients(const Problem &p, const Rows &to, int64_t begin, const Block &block,
                             float *grad_x, const float *slope_sum, int64_t first = 0) {
    const float unit = projection_unit(p);
    const float norm = p.call.quadratic ? static_cast<float>(p.call.scale) : 0.0f;
    for (int64_t r = larger<int64_t>(0, first - begin); r < block.rows; ++r) {
        float *row = grad_x + r * p.padded_dim;
        const float *x = block.x + r * p.padded_dim;
        const float along = slope_sum && p.exponential ? slope_sum[r] * norm : 0.0f;
        for (int64_t c = 0; c < p.padded_dim; c += kWidth) {
            const Vector grad = load(row + c) * unit;
            store(row + c, along == 0 ? grad : grad - load(x + c) * along);
        }
        write_gradient(p, to, begin + r, p.head_dim, row);
    }
}

// The same for a block of keys, and the gradients of their values (rows, padded_value).
inline void finish_key_gradients(const Problem &p, int64_t head, int64_t begin, const Block &block,
                                 float *grad_x, const float *slope_sum, float *grad_value,
                                 int64_t first = 0) {
    finish_gradients(p, p.key_rows(p.call.grad_key, head), begin, block, grad_x, slope_sum, first);
    const Rows to = p.key_rows(p.call.grad_value, head);
    for (int64_t r = larger<int64_t>(0, first - begin); r < block.rows; ++r) {
        write_gradient(p, to, begin + r, p.value_dim, grad_value + r * p.padded_value);
    }
}

// Gradients of the queries [begin, end) of all groups; adds those of the sums.
inline void query_gradients(const Problem &p, int64_t head, int64_t begin, int64_t end,
                            const Sums &sums, const Sums &grad_sums, QueryGradientBuffers &b) {
    const float *weights = p.weights_of(head);
    for (int64_t group = 0; group < p.call.groups; ++group) {
        const Rows to = p.query_rows(p.call.grad_query, head, group);
        for (int64_t start = begin; start < end; start += kBlock) {
            const int64_t rows = smaller(kBlock, end - start);
            b.q.fetch(p, head, group, start, rows);
            for (int64_t r = 0; r < kBlock; ++r) b.slope_sum[r] = 0;
            for (int64_t first = 0; first < p.features; first += kPanel) {
                const int64_t count = smaller(kPanel, p.features - first);
                project(p, weights, b.q.block, p.query_inner, first, count, b.features);
                multiply(count, rows, p.value_dim,
                         rows_of(sums.key_value + first * p.padded_value, p.padded_value),
                         b.q.grad_transposed, kBlock, b.slope, kBlock, false);
                query_slopes(p, b.q, sums, first, count, b.features, b.slope, grad_sums.key_sum);
                if (p.exact) add_up(b.slope, count, rows, b.slope_sum);
                b.trained.add(p, head, first, count, b.slope, b.q.block);
                multiply(count, p.padded_value, rows, rows_of(b.features, kBlock), b.q.grad,
                         p.padded_value, grad_sums.key_value + first * p.padded_value,
                         p.padded_value, true);
                multiply(rows, p.padded_dim, count, columns_of(b.slope, kBlock),
                         weights + first * p.weight_stride, p.weight_stride, b.grad_x, p.padded_dim,
                         first > 0);
            }
            finish_gradients(p, to, start, b.q.block, b.grad_x, p.exact ? b.slope_sum : nullptr);
        }
    }
}

struct KeyGradientBuffers : Buffers {
    using Buffers::Buffers;

    Block block{arena, p};
    float *value = arena.take(kBlock * p.padded_value);
    float *value_transposed = arena.take(p.padded_value * kBlock), *keep = arena.take(kBlock);
    float *features = arena.take(kPanel * kBlock), *slope = arena.take(kPanel * kBlock);
    float *slope_sum = arena.take(kBlock), *grad_x = arena.take(kBlock * p.padded_dim);
    float *grad_value = arena.take(kBlock * p.padded_value);
    WeightSums trained;
};

// For keys, as query_slopes for queries: projections become features, `slope` gradients of
// exponents; `slope_sum` (kBlock) gains their sums.
inline void key_slopes(const Problem &p, const float *log_scale, const float *grad_key_sum,
                       int64_t first, int64_t count, int64_t rows, const float *keep,
                       float *features, float *slope, float *slope_sum) {
    const Vector zero = splat(0.0f), epsilon = splat(p.epsilon);
    for (int64_t f = 0; f < count; ++f) {
        const Vector scale = splat(finite(log_scale[first + f]));
        const Vector grad_sum = splat(grad_key_sum[first + f]);
        for (int64_t r = 0; r < rows; r += kWidth) {
            float *at = features + f * kBlock + r, *slope_at = slope + f * kBlock + r;
            const Vector x = load(at), towards = load(slope_at) + grad_sum;
            Vector phi, grad;
            if (p.exponential) {
                phi = exp2(x - scale);
                grad = phi * towards;
                store(slope_sum + r, load(slope_sum + r) + grad);
            } else {
                const Vector kept = load(keep + r);
                phi = (maximum(zero, x) + epsilon) * kept;
                grad = x > zero ? towards * kept : zero;
            }
            store(at, phi);
            store(slope_at, grad);
        }
    }
}

// Gradients of the keys and values [begin, end) from those of the sums.
inline void key_gradients(const Problem &p, int64_t head, int64_t begin, int64_t end,
                          const Sums &sums, const Sums &grad_sums, KeyGradientBuffers &b) {
    const float *weights = p.weights_of(head);
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t rows = smaller(kBlock, end - start);
        load_keys_and_values(p, head, start, rows, b.block, b.keep, b.value);
        transpose(b.value, p.padded_value, rows, p.padded_value, b.value_transposed);
        for (int64_t r = 0; r < kBlock; ++r) b.slope_sum[r] = 0;
        for (int64_t first = 0; first < p.features; first += kPanel) {
            const int64_t count = smaller(kPanel, p.features - first);
            const float *grads = grad_sums.key_value + first * p.padded_value;
            project(p, weights, b.block, p.key_inner, first, count, b.features);
            multiply(count, rows, p.value_dim, rows_of(grads, p.padded_value), b.value_transposed,
                     kBlock, b.slope, kBlock, false);
            key_slopes(p, sums.log_scale, grad_sums.key_sum, first, count, rows, b.keep, b.features,
                       b.slope, b.slope_sum);
            b.trained.add(p, head, first, count, b.slope, b.block);
            multiply(rows, p.padded_value, count, columns_of(b.features, kBlock), grads,
                     p.padded_value, b.grad_value, p.padded_value, first > 0);
            multiply(rows, p.padded_dim, count, columns_of(b.slope, kBlock),
                     weights + first * p.weight_stride, p.weight_stride, b.grad_x, p.padded_dim,
                     first > 0);
        }
        finish_key_gradients(p, head, start, b.block, b.grad_x, b.slope_sum, b.grad_value);
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
