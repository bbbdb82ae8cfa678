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

bool products(const performers_call &call) {
    const Problem p(call);
    parallel(p, p.heads, [&](int64_t) {
        auto b = in_scratch<ProductBuffers>(p);
        std::memset(b.x, 0, sizeof(float) * static_cast<size_t>(b.out - b.x));
        const auto project = [&]() {
            multiply(p.features, kBlock, p.head_dim, rows_of(b.weights, p.weight_stride), b.x, kBlock,
                     b.features, kBlock, false);
        };
        for (int64_t start = 0; start < call.size; start += kBlock) {
            project();
            sum_rows(p.padded_value, p.features, kBlock, b.features, b.value, b.sums, true);
        }
        for (int64_t start = 0; start < call.groups * call.length; start += kBlock) {
            project();
            combine(p.padded_value, kBlock, p.features, b.features, b.sums, b.out, false);
        }
    });
    return true;
}

bool forward(const performers_call &call) {
    Problem p(call);
    if (call.part == PERFORMERS_EXACT) {
        forward_exact(p);
    } else if (call.causal && call.length == 1) {
        forward_step(p);
    } else {
        const Weights weights(p);
        const auto run = call.causal       ? forward_causal
                         : p.window >= 0 ? forward_windowed
                                         : forward_bidirectional;
        run(p);
    }
    return !p.nonfinite;
}

bool backward(const performers_call &call) {
    Problem p(call);
    const Weights weights(p);
    const WeightGradients trained(p);
    if (p.exact && call.part != PERFORMERS_FEATURES) backward_exact(p);
    if (call.part != PERFORMERS_EXACT) {
        const auto run = call.causal       ? backward_causal
                         : p.window >= 0 ? backward_windowed
                                         : backward_bidirectional;
        run(p, trained);
    }
    trained.finish();
    return true;
}

}  // namespace

const Kernels kernels = {forward, backward, products, forward_listed, backward_listed};

}  // namespace performers::PERFORMERS_ISA
