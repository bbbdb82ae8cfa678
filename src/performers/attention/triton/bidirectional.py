"""Launches that bidirectional and causal passes share, and those of bidirectional rows."""

from typing import Any

import torch
from torch import Tensor

from performers.attention.triton.kernels import rows, sums
from performers.attention.triton.launcher import Launcher, Sums, as_bytes
from performers.attention.triton.operators import Results, has_exact_pairs


def key_norms(launcher: Launcher, norms: Tensor, delay: int = 0, reverse: bool = False) -> None:
    """Set norms of the keys of all slots, ``(batch * heads, slots)``."""
    blocks, slots, mask = launcher.blocks("key_norms"), norms.shape[1], launcher.inputs.key_mask
    launcher.run(
        sums.key_norms, -(-slots // blocks.rows) * launcher.count, blocks,
        NORM=norms, MASK=as_bytes(mask), HAS_MASK=mask is not None, REVERSE=reverse,
        slots=slots, keys=launcher.size, delay=delay, factor=launcher.arguments["norm"],
    )  # fmt: skip


def total_sums(launcher: Launcher, norms: Tensor) -> Sums:
    """Sums over all keys, ``(batch * heads, features, value_dim)``, key sums, scales."""
    blocks = launcher.blocks("key_sums")
    span, splits = launcher.spans(launcher.size, blocks, launcher.count)
    parts = launcher.new_sums(launcher.count, splits)
    launcher.run(
        sums.key_sums, launcher.features // blocks.features * splits * launcher.count, blocks,
        **launcher.projection, **parts.named("LAST_"), NORM=norms, KV=None, KS=None, SCALE=None,
        first=0, slots=launcher.size, delay=0, span=span, splits=splits, chunks=0,
    )  # fmt: skip
    if splits == 1:
        return Sums(*(x.squeeze(1) for x in parts))
    total = Sums(*(x.squeeze(1) for x in launcher.new_sums(launcher.count, 1)))
    combine(launcher, parts, total, slots=launcher.size, span=span)
    return total


def combine(launcher: Launcher, parts: Sums, total: Sums, **given: Any) -> None:
    """Turn sums of splits into those before them, and set the total."""
    blocks = launcher.blocks("combine")
    heads, splits = parts.key_sum.shape[:2]
    launcher.run(
        sums.combine, launcher.features // blocks.features * heads, blocks,
        **parts.named(), **total.named("LAST_"), splits=splits, **given,
    )  # fmt: skip


def read_rows(launcher: Launcher, total: Sums, out: Tensor, log: Tensor) -> None:
    """Bidirectional output and logarithms of normalisers."""
    blocks = launcher.blocks("read_rows")
    launcher.run(
        rows.read_rows, launcher.query_blocks(blocks), blocks,
        **launcher.projection, **total.named(), OUT=out, LOG=log,
    )  # fmt: skip


def row_terms(
    launcher: Launcher, results: Results, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad_out . out`` of each row, and its logarithm for exact pairs and for features."""
    blocks, log = launcher.blocks("row_terms"), results.log_normaliser
    delta, ready = torch.empty_like(log), torch.empty_like(log)
    exact = has_exact_pairs(launcher.inputs)
    feature_ready = torch.empty_like(log) if exact else ready
    launcher.run(
        sums.row_terms, launcher.query_blocks(blocks), blocks,
        OUT=results.out, GRAD_OUT=grad_out, LOG=log,
        DELTA=delta, READY=ready, FEATURE_READY=feature_ready, EXACT=exact,
    )  # fmt: skip
    return delta, ready, feature_ready


def total_gradients(
    launcher: Launcher, row_terms: dict[str, Tensor], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sums over all keys."""
    blocks = launcher.blocks("query_sums")
    span, splits = launcher.spans(launcher.length, blocks, launcher.count)
    grad_kv, grad_ks, _ = launcher.new_sums(launcher.count, splits)
    launcher.run(
        sums.query_sums, launcher.features // blocks.features * splits * launcher.count, blocks,
        **row_terms, **launcher.projection, SCALE=scale, CAUSAL=False,
        GRAD_KV=None, GRAD_KS=None, LAST_KV=grad_kv, LAST_KS=grad_ks,
        first=0, span=span, splits=splits, chunks=0,
    )  # fmt: skip
    # Split after split, the same in every run.
    return grad_kv.sum(1), grad_ks.sum(1)


def query_gradients(
    launcher: Launcher, row_terms: dict[str, Tensor], total: Sums, grad_query: Tensor
) -> None:
    """Gradients of bidirectional queries."""
    blocks = launcher.blocks("query_gradients")
    launcher.run(
        rows.query_gradients, launcher.query_blocks(blocks), blocks,
        **row_terms, **launcher.projection, **total.named(), GRAD_Q=grad_query,
        pull=launcher.query_pull,
    )  # fmt: skip


def key_gradients(
    launcher: Launcher,
    norms: Tensor,
    scale: Tensor,
    gradients: tuple[Tensor, Tensor],
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Gradients of keys and values that were summed once and for all."""
    blocks = launcher.blocks("key_gradients")
    launcher.run(
        rows.key_gradients, -(-launcher.size // blocks.rows) * launcher.count, blocks,
        **launcher.projection, NORM=norms, SCALE=scale, GRAD_KV=gradients[0], GRAD_KS=gradients[1],
        GRAD_K=grad_key, GRAD_V=grad_value, length=launcher.size, pull=launcher.pull,
    )  # fmt: skip
