"""``performers::triton_forward`` and ``performers::triton_backward``: the kernels as operators.

They are defined for every device, so that Triton's interpreter runs them on the CPU. Triton itself
is imported when one first runs. Autograd keeps the inputs, the output, the logarithm of each row's
normaliser, a norm for each key and, for bidirectional calls, the sums over the keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.operators import Gradients, Inputs, define, operator

# Projections are padded to a multiple of this many features, which every block size divides.
FEATURE_BLOCK = 64


class Results(NamedTuple):
    """The results of the forward operator, which are among the arguments of the backward one.

    Attributes:
        out: Shape ``(B, Hkv, G, L, Dv)``, in the dtype of the query.
        log_normaliser: Binary logarithm of each row's normaliser, minus infinity for a row
            without keys: ``(B, Hkv, G, L)``.
        key_norm: ``scale log2(e) |k|^2 / 2`` for each causal pass over the keys, or once:
            infinite for a key that takes no part, NaN for one that holds NaN or infinity.
        lost: Rows that each causal pass takes pair by pair, as bytes ``(passes, B, Hkv, G, L)``.
        key_value: Sums over all keys. Of bidirectional calls ``(B Hkv, features, Dv)``, padded; of
            causal ones those of a state, ``(B, Hkv, m, Dv)``, if it is wanted.
        key_sum: The same without values.
        log_scale: Their scales: integer binary logarithms, or natural ones in a state.
    """

    out: Tensor
    log_normaliser: Tensor
    key_norm: Tensor
    lost: Tensor
    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor


class Upstream(NamedTuple):
    """Gradients of the results of the forward operator; those of sums are of a state."""

    grad_out: Tensor
    grad_key_value: Tensor | None
    grad_key_sum: Tensor | None


def padded_features(inputs: Inputs) -> int:
    """The features of a call, those included that fill up the last block."""
    return -(-inputs.weight.shape[-2] // FEATURE_BLOCK) * FEATURE_BLOCK


def is_swept(inputs: Inputs) -> bool:
    """True if rows see sums of their own: up to their place, their sequence, or the window."""
    return inputs.is_causal or inputs.segments is not None or inputs.window is not None


def has_exact_pairs(inputs: Inputs) -> bool:
    """True if rows meet some keys exactly."""
    return inputs.window is not None or inputs.sink_key is not None


def new_results(inputs: Inputs) -> Results:
    """Empty results; the output has the memory order of the query."""
    query, value = inputs.query, inputs.value
    batch, key_heads, groups, length, _ = query.shape
    size, width = value.shape[2:]
    if query.stride(3) > query.stride(2 if groups > 1 else 1):
        out = query.new_empty((batch, length, key_heads, groups, width)).permute(0, 2, 3, 1, 4)
    else:
        out = query.new_empty((batch, key_heads, groups, length, width))
    log = _float32(query, batch, key_heads, groups, length)
    passes = 0 if not is_swept(inputs) else 1 if inputs.is_causal else 2
    if not passes:
        sums: tuple[int, ...] = (batch * key_heads, padded_features(inputs))
    elif inputs.return_state:
        sums = (batch, key_heads, inputs.weight.shape[-2])
    else:
        sums, width = (0,), 0
    return Results(
        out,
        log,
        _float32(query, max(passes, 1), batch * key_heads, length if passes else size),
        query.new_empty((passes, *log.shape), dtype=torch.uint8),
        _float32(query, *sums, width),
        _float32(query, *sums),
        _float32(query, *sums),
    )


def new_gradients(inputs: Inputs, trained: bool = False) -> Gradients:
    """Empty gradients."""
    sinks = (
        _float32(inputs.query, 0) if x is None else torch.empty_like(x)
        for x in (inputs.sink_key, inputs.sink_value)
    )
    past = (0,) if inputs.past_key_sum is None else inputs.past_key_sum.shape
    width = inputs.value.shape[-1] if inputs.past_key_sum is not None else 0
    return Gradients(
        _rowwise_like(inputs.query),
        _rowwise_like(inputs.key),
        _rowwise_like(inputs.value),
        _float32(inputs.query, *past, width),
        _float32(inputs.query, *past),
        *sinks,
        *(_float32(inputs.query, 0) for _ in range(2)),
    )


def _rowwise_like(x: Tensor) -> Tensor:
    """Empty, with the memory order of a tensor, but for rows in one piece."""
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _forward(inputs: Inputs) -> Results:
    from performers.attention.triton import passes

    return passes.forward(inputs)


def _backward(upstream: Upstream, inputs: Inputs, results: Results, trained: bool) -> Gradients:
    from performers.attention.triton import passes

    return passes.backward(upstream, inputs, results)


class StepResults(NamedTuple):
    """The results of a single position: its rows and the state after it."""

    out: Tensor
    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor


def new_step(inputs: Inputs) -> StepResults:
    """Empty results of a single position."""
    batch, heads, groups, length, _ = inputs.query.shape
    width, sums = inputs.value.shape[-1], (batch, heads, inputs.weight.shape[-2])
    return StepResults(
        inputs.query.new_empty((batch, heads, groups, length, width)),
        _float32(inputs.query, *sums, width),
        _float32(inputs.query, *sums),
        _float32(inputs.query, *sums),
    )


def _step(inputs: Inputs) -> StepResults:
    from performers.attention.triton import passes

    return passes.step(inputs)


triton_forward, triton_backward = define("triton", _forward, _backward, new_results, new_gradients)
# Without gradients: a position that has some is a call of its own.
triton_step = operator("triton_step", _step, new_step)
