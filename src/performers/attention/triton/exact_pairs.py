"""Launches of exact pairs: the window and sinks."""

import math
from typing import Any

import torch
from torch import Tensor

from performers.attention.operators import Gradients
from performers.attention.triton.bidirectional import key_norms
from performers.attention.triton.block_sizes import Blocks
from performers.attention.triton.kernels import exact_pairs as kernels
from performers.attention.triton.launcher import Launcher, rowwise
from performers.attention.triton.operators import Results


def _arguments(
    launcher: Launcher,
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any], Blocks]:
    """Sinks and their strides, sizes, and constants of the kernels of exact pairs."""
    inputs, blocks = launcher.inputs, launcher.blocks("exact_pairs")
    sinks = inputs.sink_keys
    options = {
        **launcher.widths,
        "BT": blocks.rows,
        "HAS_SEG": launcher.segments is not None,
        "OPERAND": launcher.products["OPERAND"],
        "PRECISION": launcher.products["PRECISION"],
    }
    if sinks is None:
        return (None, None, None), (0,) * 6, options, blocks
    key, value = rowwise(sinks.key), rowwise(sinks.value)
    strides = (*key.stride()[:3], *value.stride()[:3])
    return (key, value, sinks.first.contiguous()), strides, options, blocks


def _sizes(launcher: Launcher) -> tuple[int, ...]:
    inputs = launcher.inputs
    return (launcher.length, launcher.size, inputs.offset, inputs.window or 0)


def every_norm(launcher: Launcher) -> Tensor | None:
    """Norms of the keys as they stand, for the window."""
    if launcher.inputs.window is None:
        return None
    norms = launcher.new(launcher.count, launcher.size)
    key_norms(launcher, norms)
    return norms


def exact_rows(
    launcher: Launcher, norms: Tensor | None, part: tuple[Tensor, Tensor], results: Results
) -> None:
    """Output and logarithms of features and exact pairs together."""
    sinks, strides, options, blocks = _arguments(launcher)
    inputs, out = launcher.inputs, results.out
    launcher.launch(
        kernels.exact_rows,
        -(-launcher.length // blocks.rows) * launcher.count * launcher.groups,
        launcher.query, launcher.key, launcher.value, norms, launcher.segments, *sinks, *part, out,
        results.log_normaliser,
        *launcher.strides(), *part[0].stride()[:4], *out.stride()[:4], *strides,
        launcher.heads, launcher.groups, *_sizes(launcher), launcher.sinks,
        inputs.scale * math.log2(math.e), launcher.norm, launcher.log_normalizer,
        **options, BS=blocks.features, CAUSAL=inputs.is_causal,
        HAS_WINDOW=inputs.window is not None, HAS_SINKS=launcher.sinks > 0,
        blocks=blocks,
    )  # fmt: skip


def exact_gradients(
    launcher: Launcher,
    norms: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor],
    gradients: Gradients,
) -> None:
    """Add the gradients by exact pairs, and set those of sinks."""
    sinks, strides, options, blocks = _arguments(launcher)
    inputs, grad_out = launcher.inputs, rows[0]
    scale = inputs.scale * math.log2(math.e)
    query, key, value = gradients[:3]
    launcher.launch(
        kernels.exact_query_gradients,
        -(-launcher.length // blocks.rows) * launcher.count * launcher.groups,
        launcher.query, launcher.key, launcher.value, norms, launcher.segments, *sinks, *rows,
        query, *launcher.strides(), *grad_out.stride()[:4], *query.stride()[:4], *strides,
        launcher.heads, launcher.groups, *_sizes(launcher), launcher.sinks, scale,
        inputs.scale, **options, BS=blocks.features, CAUSAL=inputs.is_causal,
        HAS_WINDOW=inputs.window is not None, HAS_SINKS=launcher.sinks > 0,
        blocks=blocks,
    )  # fmt: skip
    if inputs.window is not None:
        launcher.launch(
            kernels.exact_key_gradients,
            -(-launcher.size // blocks.features) * launcher.count,
            launcher.query, launcher.key, launcher.value, norms, launcher.segments, *rows,
            key, value, *launcher.strides(), *grad_out.stride()[:4],
            *key.stride()[:3], *value.stride()[:3],
            launcher.heads, launcher.groups, *_sizes(launcher), scale, inputs.scale,
            **options, BS=blocks.features, CAUSAL=inputs.is_causal,
            blocks=blocks,
        )  # fmt: skip
    if launcher.sinks:
        _sink_gradients(launcher, rows, gradients)


def _sink_gradients(
    launcher: Launcher, rows: tuple[Tensor, Tensor, Tensor], gradients: Gradients
) -> None:
    sinks, strides, options, blocks = _arguments(launcher)
    inputs = launcher.inputs
    sequences = sinks[0].shape[0]
    bounds = torch.zeros(sequences, 2, dtype=torch.int64, device=launcher.query.device)
    if inputs.segments is None:
        bounds[:, 1] = launcher.length
    else:
        each = torch.arange(sequences, device=launcher.query.device)
        bounds[:, 0] = torch.searchsorted(inputs.segments, each)
        bounds[:, 1] = torch.searchsorted(inputs.segments, each, right=True)
    programs = -(-launcher.sinks // 16) * launcher.heads * sequences
    splits = launcher.splits(programs, launcher.length // sequences, waves=2)
    shape = (splits, sequences, launcher.heads, launcher.sinks)
    grad_key, grad_value = (
        launcher.new(*shape, launcher.head_dim),
        launcher.new(*shape, launcher.value_dim),
    )
    launcher.launch(
        kernels.sink_gradients,
        programs * splits,
        launcher.query, launcher.segments, *sinks, bounds, *rows, grad_key, grad_value,
        *launcher.query.stride()[:4], *rows[0].stride()[:4], *strides,
        launcher.heads, launcher.groups, launcher.length, sequences, launcher.sinks, splits,
        inputs.scale * math.log2(math.e), inputs.scale,
        **options,
        blocks=blocks,
    )  # fmt: skip
    # Split after split, the same in every run.
    gradients.sink_key.copy_(grad_key.sum(0))
    gradients.sink_value.copy_(grad_value.sum(0))
