"""``performers::triton_forward`` and ``performers::triton_backward``: the kernels as operators.

They are defined for every device, so that Triton's interpreter runs them on the CPU. Triton itself
is imported when one first runs. Autograd keeps the inputs, the output, the logarithm of each row's
normaliser, a norm for each key and, for bidirectional calls, the sums over the keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from performers.attention.native.operators import (
    Gradients,
    Inputs,
    Upstream,
    gradients_of,
    operator,
    refuse_second_derivative,
)

# Projections are padded to a multiple of this many features, which every block size divides.
FEATURE_BLOCK = 64


class Results(NamedTuple):
    """The results of the forward operator, which are among the arguments of the backward one.

    Attributes:
        out: Shape ``(B, Hkv, G, L, Dv)``, in the dtype of the query.
        log_normaliser: Binary logarithm of each row's normaliser, minus infinity for a row
            without keys: ``(B, Hkv, G, L)``.
        key_norm: ``scale log2(e) |k|^2 / 2``: infinite for a key that takes no part, NaN for one
            that holds NaN or infinity.
        key_value: Sums over all keys of bidirectional calls, ``(B Hkv, features, Dv)``.
        key_sum: The same without values.
        log_scale: Binary logarithms of their scales.
    """

    out: Tensor
    log_normaliser: Tensor
    key_norm: Tensor
    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor


def padded_features(inputs: Inputs) -> int:
    """The features of a call, those included that fill up the last block."""
    return -(-inputs.weight.shape[-2] // FEATURE_BLOCK) * FEATURE_BLOCK


def new_results(inputs: Inputs) -> Results:
    """Empty results; the output has the memory order of the query."""
    query, value = inputs.query, inputs.value
    batch, key_heads, groups, length, _ = query.shape
    size, width = value.shape[2:]
    if query.stride(3) > query.stride(2 if groups > 1 else 1):
        out = query.new_empty((batch, length, key_heads, groups, width)).permute(0, 2, 3, 1, 4)
    else:
        out = query.new_empty((batch, key_heads, groups, length, width))
    sums = (batch * key_heads, padded_features(inputs))
    return Results(
        out,
        _float32(query, batch, key_heads, groups, length),
        _float32(query, batch * key_heads, size),
        _float32(query, *sums, width),
        _float32(query, *sums),
        _float32(query, *sums),
    )


def new_gradients(inputs: Inputs) -> Gradients:
    """Empty gradients."""
    none = _float32(inputs.query, 0)
    return Gradients(
        torch.empty_like(inputs.query),
        torch.empty_like(inputs.key),
        torch.empty_like(inputs.value),
        *(none.clone() for _ in range(6)),
    )


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _forward(inputs: Inputs) -> Results:
    from performers.attention.triton import launch

    return launch.forward(inputs)


def _backward(upstream: Upstream, inputs: Inputs, results: Results) -> Gradients:
    from performers.attention.triton import launch

    return launch.backward(upstream, inputs, results)


def _fake_backward(upstream: Upstream, inputs: Inputs, results: Results) -> Gradients:
    return new_gradients(inputs)


_TENSORS = Inputs._fields.index("kind")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.constants = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Once: under torch.utils.checkpoint a second look is an error.
    saved = ctx.saved_tensors
    inputs, results = Inputs(*saved[:_TENSORS], *ctx.constants), Results(*saved[_TENSORS:])
    grad_out, out = grads[0], results.out
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    upstream = Upstream(grad_out, None, None, None)
    gradients = Gradients(*triton_backward(*upstream, *inputs, *results))
    wanted = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))
    return gradients_of(Inputs._fields, wanted, gradients)


triton_forward = operator("performers::triton_forward", _forward, new_results, None)
triton_backward = operator("performers::triton_backward", _backward, _fake_backward, None)
triton_forward.register_autograd(_derivative, setup_context=_setup_context)
triton_backward.register_autograd(refuse_second_derivative)
