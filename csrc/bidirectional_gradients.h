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
    void fetch_grad(int64_t head, int64_t group, int64_t begin, int64_t rows) {
        block.rows = rows;
        load_values(p, p.rows(p.call.grad_out, head, group), begin, rows, nullptr, grad);
        transpose(grad, p.padded_value, rows, p.padded_value, grad_transposed);
    }

    void fetch(int64_t head, int64_t group, int64_t begin, int64_t rows) {
        block.load_queries(p.rows(p.call.query, head, group), begin, rows);
        fetch_grad(head, group, begin, rows);
        const Rows outputs = p.rows(p.call.out, head, group);
        const int64_t index = p.row_index(head, group, begin);
        for (int64_t r = 0; r < round_up(rows, kWidth); ++r) {
            delta[r] = scale[r] = inverse[r] = 0;
            if (r >= rows) continue;
            read(outputs, begin + r, p.value_dim, p.padded_value, out);
            Vector sum = splat(0.0f);
            for (int64_t c = 0; c < p.padded_value; c += kWidth) {
                sum += load(out + c) * load(grad + r * p.padded_value + c);
            }
            delta[r] = total(sum);
            if (p.call.grad_log_normaliser) delta[r] -= p.call.grad_log_normaliser[index + r];
            scale[r] = p.call.row_scale[index + r];
            inverse[r] = p.call.row_inverse[index + r];
        }
        if (!p.exact) return;
        block.offsets(out);
        for (int64_t r = 0; r < round_up(rows, kWidth); ++r) {
            whole_scale[r] = scale[r];
            scale[r] -= out[r];
        }
    }

    // The feature of exponents x at a scale, or of projections x, over the normaliser. A power is at
    // most one but for rows that are exact: those have a scale of their own, at which it could
    // overflow. They get zeros.
    Vector normalised_feature(Vector x, Vector log_scale, int64_t r) const {
        const Vector zero = splat(0.0f), over = maximum(zero, load(inverse + r));
        if (!p.exponential) return (maximum(zero, x) + splat(p.epsilon)) * over;
        return exp2(minimum(splat(1.0f), x + log_scale - load(scale + r))) * over;
    }
};

// Normalised pairs (keys, kBlock queries) of two blocks, and their gradients.
struct PairGradients : Buffers {
    using Buffers::Buffers;

    float *weights = arena.take(kBlock * kBlock), *grads = arena.take(kBlock * kBlock);
    float *grads_of_rows = arena.take(kBlock * kBlock);  // their transpose

    // d loss / d (normalised pair): grad_i . v_j - delta_i within the band, else zero.
    void load_grads(int64_t keys, const float *value, const QueryGradientBlock &q, Band band) const {
        multiply_band(keys, q.block.rows, p.value_dim, rows_of(value, p.padded_value),
                      q.grad_transposed, kBlock, grads, kBlock, band);
        for (int64_t t = 0; t < keys; ++t) {
            const int64_t first = larger<int64_t>(0, t - band.high) / kWidth * kWidth;
            for (int64_t r = first; r < q.block.rows; r += kWidth) {
                float *at = grads + t * kBlock + r;
                store(at, load(at) - load(q.delta + r));
            }
        }
        clear_outside(grads, keys, q.block.rows, band);
    }

    // Adds to the slopes of queries, from the features of keys.
    void add_to_queries(int64_t keys, const QueryGradientBlock &q, const float *features, Band band,
                        float *slope) const {
        multiply(p.features, q.block.rows, keys, rows_of(features, kBlock), grads, kBlock, slope,
                 kBlock, true, by_column(band));
    }

    // Adds to the slopes of keys, from the features of queries, and to the gradients of values.
    void add_to_keys(int64_t keys, const QueryGradientBlock &q, const float *features, Band band,
                     float *slope, float *grad_value) const {
        const int64_t rows = q.block.rows;
        for (int64_t i = keys * kBlock; i < round_up(keys, kWidth) * kBlock; ++i) grads[i] = 0;
        transpose(grads, kBlock, keys, round_up(rows, kWidth), grads_of_rows);
        multiply(p.features, keys, rows, rows_of(features, kBlock), grads_of_rows, kBlock, slope,
                 kBlock, true, by_column(band.reversed()));
        sum_rows(p.padded_value, keys, rows, weights, q.grad, grad_value, true,
                 by_row(band.reversed()));
    }
};

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
        const int64_t row = p.weight_row(head) + first;
        sum_rows(p.padded_dim, count, block.rows, slope, block.x, weight + row * p.padded_dim, true);
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
    const Vector zero = splat(0.0f);
    for (int64_t f = 0; f < count; ++f) {
        const Vector scale = splat(sums.log_scale[first + f]);
        const Vector key_sum = splat(sums.key_sum[first + f]);
        Vector lost = zero;
        for (int64_t r = 0; r < q.block.rows; r += kWidth) {
            float *at = features + f * kBlock + r, *slope_at = slope + f * kBlock + r;
            const Vector x = load(at), phi = q.normalised_feature(x, scale, r);
            const Vector towards = load(slope_at) - load(q.delta + r) * key_sum;
            store(at, phi);
            store(slope_at, p.exponential ? phi * towards
                            : x > zero    ? towards * maximum(zero, load(q.inverse + r))
                                          : zero);
            lost += phi * load(q.delta + r);
        }
        if (grad_key_sum) grad_key_sum[first + f] -= total(lost);
    }
}

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

// Gradients of a block of queries or keys, from the slopes of their projections.
struct InputGradients : Buffers {
    using Buffers::Buffers;

    float *slope_sum = arena.take(kBlock), *grad_x = arena.take(kBlock * p.padded_dim);
    WeightSums trained;

    // Slopes (count, kBlock) of features from `first` on, panel by panel of a block; `norm`: they are
    // of exponents that lose |x|^2.
    void add(int64_t head, const Block &block, int64_t first, int64_t count, const float *slope,
             bool norm) {
        for (int64_t r = 0; first == 0 && r < kBlock; ++r) slope_sum[r] = 0;
        if (norm) add_up(slope, count, block.rows, slope_sum);
        trained.add(p, head, first, count, slope, block);
        multiply(block.rows, p.padded_dim, count, columns_of(slope, kBlock),
                 p.weights_of(head) + first * p.weight_stride, p.weight_stride, grad_x, p.padded_dim,
                 first > 0);
    }

    // Completes row r of grad_x.
    float *finish_row(const Block &block, int64_t r) const {
        const float unit = p.exponential ? kLn2 : 1.0f;  // of a projection
        const float along = p.call.quadratic ? slope_sum[r] * static_cast<float>(p.call.scale) : 0;
        float *row = grad_x + r * p.padded_dim;
        const float *x = block.x + r * p.padded_dim;
        for (int64_t c = 0; c < p.padded_dim; c += kWidth) {
            const Vector grad = load(row + c) * unit;
            store(row + c, along == 0 ? grad : grad - load(x + c) * along);
        }
        return row;
    }

    // Writes them to the rows from `begin` on, but for those before `first`.
    void finish(const Block &block, const Rows &to, int64_t begin, int64_t first = 0) const {
        for (int64_t r = larger<int64_t>(0, first - begin); r < block.rows; ++r) {
            write_gradient(p, to, begin + r, p.head_dim, finish_row(block, r));
        }
    }

    // The same for a block of keys, with the gradients of their values (rows, padded_value).
    void finish_keys(int64_t head, const Block &block, int64_t begin, float *grad_value,
                     int64_t first = 0) const {
        finish(block, p.rows(p.call.grad_key, head), begin, first);
        const Rows to = p.rows(p.call.grad_value, head);
        for (int64_t r = larger<int64_t>(0, first - begin); r < block.rows; ++r) {
            write_gradient(p, to, begin + r, p.value_dim, grad_value + r * p.padded_value);
        }
    }
};

struct GradientBuffers : KeyBuffers {
    using KeyBuffers::KeyBuffers;

    QueryGradientBlock q{arena, p};
    float *slope = arena.take(kPanel * kBlock), *grad_value = arena.take(kBlock * p.padded_value);
    InputGradients inputs{arena, p};
    Sums sums{arena, p}, grad_sums{arena, p};
};

// Gradients of the queries [begin, end) of all groups; adds those of the sums.
inline void query_gradients(const Problem &p, int64_t head, int64_t begin, int64_t end,
                            GradientBuffers &b) {
    for (int64_t group = 0; group < p.call.groups; ++group) {
        const Rows to = p.rows(p.call.grad_query, head, group);
        for (int64_t start = begin; start < end; start += kBlock) {
            const int64_t rows = smaller(kBlock, end - start);
            b.q.fetch(head, group, start, rows);
            for (int64_t first = 0; first < p.features; first += kPanel) {
                const int64_t count = smaller(kPanel, p.features - first);
                project(p, head, b.q.block, first, count, b.panel);
                value_products(p, count, rows, b.sums.row(first), b.q.grad_transposed, b.slope);
                query_slopes(p, b.q, b.sums, first, count, b.panel, b.slope, b.grad_sums.key_sum);
                b.inputs.add(head, b.q.block, first, count, b.slope, p.exact);
                sum_rows(p.padded_value, count, rows, b.panel, b.q.grad, b.grad_sums.row(first),
                         true);
            }
            b.inputs.finish(b.q.block, to, start);
        }
    }
}

// For keys, as query_slopes for queries: projections become features, `slope` gradients of
// exponents.
inline void key_slopes(const Problem &p, const float *log_scale, const float *grad_key_sum,
                       int64_t first, int64_t count, int64_t rows, const float *keep,
                       float *features, float *slope) {
    const Vector zero = splat(0.0f), epsilon = splat(p.epsilon);
    for (int64_t f = 0; f < count; ++f) {
        const Vector scale = splat(finite(log_scale[first + f]));
        const Vector grad_sum = splat(grad_key_sum[first + f]);
        for (int64_t r = 0; r < rows; r += kWidth) {
            float *at = features + f * kBlock + r, *slope_at = slope + f * kBlock + r;
            const Vector x = load(at), towards = load(slope_at) + grad_sum, kept = load(keep + r);
            const Vector phi =
                p.exponential ? exp2(x - scale) : (maximum(zero, x) + epsilon) * kept;
            store(at, phi);
            store(slope_at, p.exponential ? phi * towards : x > zero ? towards * kept : zero);
        }
    }
}

// The same for all features of keys, where these are known and exponential.
inline void known_key_slopes(const Problem &p, int64_t rows, const float *features,
                             const float *grad_key_sum, float *slope) {
    for (int64_t f = 0; f < p.features; ++f) {
        for (int64_t r = f * kBlock; r < f * kBlock + rows; r += kWidth) {
            store(slope + r, load(features + r) * (load(slope + r) + splat(grad_key_sum[f])));
        }
    }
}

// Gradients of the keys and values [begin, end) from those of the sums.
inline void key_gradients(const Problem &p, int64_t head, int64_t begin, int64_t end,
                          GradientBuffers &b) {
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t rows = smaller(kBlock, end - start);
        b.load_keys(head, start, rows);
        b.transpose_values();
        for (int64_t first = 0; first < p.features; first += kPanel) {
            const int64_t count = smaller(kPanel, p.features - first);
            project(p, head, b.block, first, count, b.panel);
            value_products(p, count, rows, b.grad_sums.row(first), b.value_transposed, b.slope);
            key_slopes(p, b.sums.log_scale, b.grad_sums.key_sum, first, count, rows, b.keep, b.panel,
                       b.slope);
            b.inputs.add(head, b.block, first, count, b.slope, p.exponential);
            combine(p.padded_value, rows, count, b.panel, b.grad_sums.row(first), b.grad_value,
                    first > 0);
        }
        b.inputs.finish_keys(head, b.block, start, b.grad_value);
    }
}

}  // namespace
}  // namespace performers::PERFORMERS_ISA
