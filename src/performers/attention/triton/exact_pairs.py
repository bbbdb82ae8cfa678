"""Launches of exact pairs: the window and sinks."""

from typing import Any

import torch
from torch import Tensor

from performers.attention.operators import Gradients
from performers.attention.triton.bidirectional import key_norms
from performers.attention.triton.kernels import exact_pairs as kernels
from performers.attention.triton.launcher import Launcher, rowwise


def every_norm(launcher: Launcher) -> Tensor | None:
    """Norms of the keys as they stand, for the window."""
    if launcher.inputs.window is None:
        return None
    norms = launcher.new(launcher.count, launcher.size)
    key_norms(launcher, norms)
    return norms


def _sinks(launcher: Launcher) -> dict[str, Tensor | None]:
    sinks = launcher.inputs.sink_keys
    if sinks is None:
        return {"SINK_K": None, "SINK_V": None, "FIRST": None}
    key, value = rowwise(sinks.key), rowwise(sinks.value)
    return {"SINK_K": key, "SINK_V": value, "FIRST": sinks.first.contiguous()}


def exact_rows(launcher: Launcher, **rows: Tensor) -> None:
    """Output and logarithms of features, the part of each row that there is, and exact pairs."""
    blocks = launcher.blocks("exact_pairs")
    launcher.run(
        kernels.exact_rows, launcher.query_blocks(blocks), blocks,
        **rows, **_sinks(launcher), NORM=every_norm(launcher), BS=blocks.features,
    )  # fmt: skip


def exact_gradients(launcher: Launcher, row_terms: dict[str, Tensor], gradients: Gradients) -> None:
    """Add the gradients by exact pairs, and set those of sinks."""
    blocks = launcher.blocks("exact_pairs")
    arguments: dict[str, Any] = {"NORM": every_norm(launcher), "BS": blocks.features, **row_terms}
    sinks = _sinks(launcher)
    launcher.run(
        kernels.exact_query_gradients, launcher.query_blocks(blocks), blocks,
        **arguments, **sinks, GRAD_Q=gradients.query,
    )  # fmt: skip
    if launcher.inputs.window is not None:
        launcher.run(
            kernels.exact_key_gradients,
            -(-launcher.size // blocks.features) * launcher.count, blocks,
            **arguments, GRAD_K=gradients.key, GRAD_V=gradients.value,
        )  # fmt: skip
    if launcher.sinks:
        _sink_gradients(launcher, {**row_terms, **sinks}, gradients)


def _sink_gradients(
    launcher: Launcher, arguments: dict[str, Tensor | None], gradients: Gradients
) -> None:
    inputs, device = launcher.inputs, launcher.query.device
    sequences = gradients.sink_key.shape[0]
    bounds = torch.zeros(sequences, 2, dtype=torch.int64, device=device)
    if inputs.segments is None:
        bounds[:, 1] = launcher.length
    else:
        each = torch.arange(sequences, device=device)
        bounds[:, 0] = torch.searchsorted(inputs.segments, each)
        bounds[:, 1] = torch.searchsorted(inputs.segments, each, right=True)
    programs = -(-launcher.sinks // 16) * launcher.heads * sequences
    splits = launcher.splits(programs, launcher.length // sequences, waves=2)
    shape = (splits, sequences, launcher.heads, launcher.sinks)
    grad_key = launcher.new(*shape, launcher.head_dim)
    grad_value = launcher.new(*shape, launcher.value_dim)
    launcher.run(
        kernels.sink_gradients, programs * splits, launcher.blocks("exact_pairs"),
        **arguments, BOUNDS=bounds, GRAD_K=grad_key, GRAD_V=grad_value,
        sequences=sequences, splits=splits,
    )  # fmt: skip
    # Split after split, the same in every run.
    gradients.sink_key.copy_(grad_key.sum(0))
    gradients.sink_value.copy_(grad_value.sum(0))
