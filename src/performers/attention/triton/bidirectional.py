"""Launches that bidirectional and causal passes share, and those of bidirectional rows."""

import torch
from torch import Tensor

from performers.attention.triton.kernels import rows, sums
from performers.attention.triton.launcher import Launcher, Sums, as_bytes
from performers.attention.triton.operators import Results, has_exact_pairs


def key_norms(launcher: Launcher, norms: Tensor, delay: int = 0, reverse: bool = False) -> None:
    """Set norms of the keys of all slots, ``(batch * heads, slots)``."""
    inputs, blocks = launcher.inputs, launcher.blocks("key_norms")
    slots = norms.shape[1]
    launcher.launch(
        sums.key_norms,
        -(-slots // blocks.rows) * launcher.count,
        launcher.key, launcher.value, as_bytes(inputs.key_mask), launcher.segments, norms,
        *launcher.key.stride()[:3], *launcher.value.stride()[:3],
        launcher.heads, slots, launcher.size, delay, launcher.norm,
        **launcher.widths,
        BT=blocks.rows,
        HAS_MASK=inputs.key_mask is not None,
        HAS_SEG=launcher.segments is not None,
        REVERSE=reverse,
        blocks=blocks,
    )  # fmt: skip


def total_sums(launcher: Launcher, norms: Tensor) -> Sums:
    """Sums over all keys, ``(batch * heads, features, value_dim)``, key sums, scales."""
    blocks = launcher.blocks("key_sums")
    span, splits = launcher.spans(launcher.size, blocks, launcher.count)
    parts = launcher.new_sums(launcher.count, splits)
    launcher.launch(
        sums.key_sums,
        launcher.features // blocks.features * splits * launcher.count,
        launcher.key, launcher.value, norms, None, *launcher.projection, None, None, None,
        None, None, None, *parts,
        *launcher.key.stride()[:3], *launcher.value.stride()[:3],
        launcher.heads, 0, launcher.size, 0, span, splits, 0, launcher.features,
        **launcher.widths, **launcher.products,
        BM=blocks.features, BT=blocks.rows,
        HAS_START=False, STATES=False, HAS_SEG=False, REVERSE=False,
        blocks=blocks,
    )  # fmt: skip
    if splits == 1:
        return Sums(*(x.squeeze(1) for x in parts))
    total = Sums(*(x.squeeze(1) for x in launcher.new_sums(launcher.count, 1)))
    combine(launcher, parts, None, total, launcher.size, span)
    return total


def combine(
    launcher: Launcher,
    parts: Sums,
    start: Sums | None,
    total: Sums,
    length: int,
    span: int,
    **options: bool,
) -> None:
    """Turn sums of splits into those before them, from ``start`` on, and set the total."""
    blocks = launcher.blocks("combine")
    heads, splits = parts.key_sum.shape[:2]
    launcher.launch(
        sums.combine,
        launcher.features // blocks.features * heads,
        *parts, *(start or (None, None, None)), *total, launcher.segments,
        length, span, splits, launcher.features,
        DV=launcher.value_dim, BV=launcher.widths["BV"], BM=blocks.features,
        HAS_START=start is not None,
        **{"HAS_SEG": False, "REVERSE": False, **options},
        blocks=blocks,
    )  # fmt: skip


def read_rows(launcher: Launcher, total: Sums, out: Tensor, log: Tensor) -> None:
    """Bidirectional output and logarithms of normalisers."""
    blocks = launcher.blocks("read_rows")
    launcher.launch(
        rows.read_rows,
        -(-launcher.length // blocks.rows) * launcher.count * launcher.groups,
        launcher.query, *launcher.projection, *total, out, log,
        *launcher.query.stride()[:4], *out.stride()[:4],
        launcher.heads, launcher.groups, launcher.length, launcher.features,
        **launcher.widths, **launcher.products,
        BM=blocks.features, BT=blocks.rows,
        blocks=blocks,
    )  # fmt: skip


def row_terms(
    launcher: Launcher, results: Results, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad_out . out`` of each row, and its logarithm for exact pairs and for features."""
    blocks = launcher.blocks("row_terms")
    out, log = results.out, results.log_normaliser
    delta, ready = torch.empty_like(log), torch.empty_like(log)
    exact = has_exact_pairs(launcher.inputs)
    feature_ready = torch.empty_like(log) if exact else ready
    launcher.launch(
        sums.row_terms,
        -(-launcher.length // blocks.rows) * launcher.count * launcher.groups,
        launcher.query, out, grad_out, log, delta, ready, feature_ready,
        *launcher.query.stride()[:4], *out.stride()[:4], *grad_out.stride()[:4],
        launcher.heads, launcher.groups, launcher.length, launcher.norm, launcher.log_normalizer,
        **launcher.widths, BT=blocks.rows, EXACT=exact,
        blocks=blocks,
    )  # fmt: skip
    return delta, ready, feature_ready


def total_gradients(
    launcher: Launcher, grad_out: Tensor, delta: Tensor, log: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the sums over all keys."""
    blocks = launcher.blocks("query_sums")
    span, splits = launcher.spans(launcher.length, blocks, launcher.count)
    grad_kv, grad_ks, _ = launcher.new_sums(launcher.count, splits)
    launcher.launch(
        sums.query_sums,
        launcher.features // blocks.features * splits * launcher.count,
        launcher.query, grad_out, delta, log, None, *launcher.projection, scale, None, None,
        None, None, grad_kv, grad_ks,
        *launcher.query.stride()[:4], *grad_out.stride()[:4],
        launcher.heads, launcher.groups, 0, launcher.length, span, splits, 0, launcher.features,
        **launcher.widths, **launcher.products,
        BM=blocks.features, BT=blocks.rows,
        HAS_START=False, CAUSAL=False, STATES=False, HAS_SEG=False, REVERSE=False,
        blocks=blocks,
    )  # fmt: skip
    # Split after split, the same in every run.
    return grad_kv.sum(1), grad_ks.sum(1)


def query_gradients(
    launcher: Launcher,
    grad_out: Tensor,
    delta: Tensor,
    log: Tensor,
    total: Sums,
    grad_query: Tensor,
    *,
    add: bool = False,
) -> None:
    """Gradients of bidirectional queries."""
    blocks = launcher.blocks("query_gradients")
    launcher.launch(
        rows.query_gradients,
        -(-launcher.length // blocks.rows) * launcher.count * launcher.groups,
        launcher.query, grad_out, delta, log, *launcher.projection, *total, grad_query,
        *launcher.query.stride()[:4], *grad_out.stride()[:4], *grad_query.stride()[:4],
        launcher.heads, launcher.groups, launcher.length, launcher.features, launcher.query_pull,
        **launcher.widths, **launcher.products,
        BM=blocks.features, BT=blocks.rows, ADD=add,
        blocks=blocks,
    )  # fmt: skip


def key_gradients(
    launcher: Launcher,
    norms: Tensor,
    scale: Tensor,
    gradients: tuple[Tensor, Tensor],
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    add: bool = False,
) -> None:
    """Gradients of keys and values that were summed once and for all."""
    blocks = launcher.blocks("key_gradients")
    launcher.launch(
        rows.key_gradients,
        -(-launcher.size // blocks.rows) * launcher.count,
        launcher.key, launcher.value, norms, *launcher.projection, scale, *gradients,
        grad_key, grad_value,
        *launcher.key.stride()[:3], *launcher.value.stride()[:3],
        *grad_key.stride()[:3], *grad_value.stride()[:3],
        launcher.heads, launcher.size, launcher.features, launcher.pull,
        **launcher.widths, **launcher.products,
        BM=blocks.features, BT=blocks.rows, ADD=add,
        blocks=blocks,
    )  # fmt: skip
