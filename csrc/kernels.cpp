// The kernels of one instruction set: this file is compiled once for each, with PERFORMERS_ISA as
// the name of a namespace.
#include "kernels.h"

#include "bidirectional_tasks.h"
#include "causal_tasks.h"
#include "exact_tasks.h"
#include "listed_gradients.h"
#include "step_forward.h"
#include "windowed_tasks.h"

namespace performers::PERFORMERS_ISA {
namespace {

// The matrix products of a bidirectional forward pass and nothing else: no input is read, no
// exponential taken, and all operands stay in the caches. A floor for measurements.
struct ProductBuffers : Buffers {
    using Buffers::Buffers;

    float *x = arena.take(p.weight_stride * kBlock);
    float *weights = arena.take(p.features * p.weight_stride);
    float *features = arena.take(p.features * kBlock), *value = arena.take(kBlock * p.padded_value);
    float *sums = arena.take(p.features * p.padded_value);
    float *out = arena.take(kBlock * p.padded_value);
};

void products(const performers_call &call) {
    const Problem p(call);
    parallel(p, p.heads, [&](int64_t) {
        auto b = in_scratch<ProductBuffers>(p);
        std::memset(b.x, 0, sizeof(float) * static_cast<size_t>(b.out - b.x));
        const Operand weights = rows_of(b.weights, p.weight_stride);
        for (int64_t start = 0; start < call.size; start += kBlock) {
            multiply(p.features, kBlock, p.head_dim, weights, b.x, kBlock, b.features, kBlock,
                     false);
            multiply(p.features, p.padded_value, kBlock, rows_of(b.features, kBlock), b.value,
                     p.padded_value, b.sums, p.padded_value, true);
        }
        for (int64_t start = 0; start < call.groups * call.length; start += kBlock) {
            multiply(p.features, kBlock, p.head_dim, weights, b.x, kBlock, b.features, kBlock,
                     false);
            multiply(kBlock, p.padded_value, p.features, columns_of(b.features, kBlock), b.sums,
                     p.padded_value, b.out, p.padded_value, false);
        }
    });
}

void forward_features(Problem &p) {
    const Weights weights(p);
    if (p.call.causal) return forward_causal(p);
    if (p.window >= 0) return forward_windowed(p);
    forward_bidirectional(p);
}

bool forward(const performers_call &call) {
    Problem p(call);
    if (call.part == PERFORMERS_EXACT) {
        forward_exact(p);
    } else if (call.causal && call.length == 1) {
        forward_step(p);
    } else {
        forward_features(p);
    }
    return !p.nonfinite;
}

void backward(const performers_call &call) {
    Problem p(call);
    const Weights weights(p);
    const WeightGradients trained(p);
    if (p.exact && call.part != PERFORMERS_FEATURES) backward_exact(p);
    if (call.part == PERFORMERS_EXACT) {
        // Features have no share.
    } else if (call.causal) {
        const CausalPlan plan(p);
        if (plan.scan) {
            backward_causal_scan(p, plan, trained);
        } else {
            backward_causal_sequences(p, plan, trained);
        }
    } else if (p.window >= 0) {
        backward_windowed(p, trained);
    } else {
        backward_bidirectional(p, trained);
    }
    trained.finish();
}

}  // namespace

const Kernels kernels = {forward, backward, products, forward_listed, backward_listed};

}  // namespace performers::PERFORMERS_ISA
