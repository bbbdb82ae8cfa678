"""The keys that are met exactly: a window around each query, and the first keys of a sequence.

Attention splits the keys of a query in two (Chen et al. 2021, Scatterbrain, arXiv 2110.15343): a
sparse set ``S_i`` that is met with ``exp(scale q . k)`` itself, and the rest, met through features,
under one normaliser:

    out_i = (sum_{S_i} e^{s q_i . k_j} v_j + sum_{rest} K(q_i, k_j) v_j) / (the same without v_j)

No key is in both sums, so numerator and denominator stay unbiased, and nothing is subtracted.
This module finds the sinks, joins what a state held with what a call brings, and collects what the
next call will need.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.problem import AttentionProblem, SinkKeys
from performers.attention.state import FavorState


def find_sinks(
    sinks: int,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    state: FavorState | None,
    *,
    is_causal: bool,
    length: int,
) -> tuple[SinkKeys, Tensor]:
    """The first ``sinks`` keys that take part, of every sequence.

    Args:
        sinks: How many.
        key: Shape ``(batch, key_heads, S, head_dim)``, those of this call.
        value: Shape ``(batch, key_heads, S, value_dim)``.
        key_mask: Shape ``(batch, S)`` or None.
        segments: Shape ``(S,)``, the packed sequence of each key, or None.
        num_segments: How many packed sequences there are.
        state: The past, or None.
        is_causal: Whether sinks are seen from their own position on.
        length: The number of queries.

    Returns:
        The sinks, and the mask ``(batch, S)`` of the keys that are left.
    """
    batch, size = key.shape[0], key.shape[2]
    taking = key_mask
    if taking is None:
        taking = torch.ones(batch, size, dtype=torch.bool, device=key.device)
    rank = taking.long().cumsum(1)
    rows = torch.arange(batch, device=key.device).unsqueeze(1).expand(batch, size)
    sequences = batch
    if segments is not None:
        sequences, rows = num_segments, segments.unsqueeze(0)
        # Ranks within a segment: less the largest of the segments before it.
        before = torch.zeros(num_segments + 1, dtype=torch.int64, device=key.device)
        before = before.scatter_reduce(0, segments + 1, rank[0], "amax").cummax(0).values
        rank = rank - before[segments]
    if state is not None:
        assert state.sink_mask is not None
        rank = rank + state.sink_mask.sum(1, keepdim=True)
    is_sink = taking & (rank <= sinks)
    # One place more than there are sinks takes what is none.
    slot = (rank - 1).where(is_sink, sinks)
    index = torch.full((sequences, sinks + 1), -1, dtype=torch.int64, device=key.device)
    places = torch.arange(size, device=key.device).expand(batch, size)
    index = index.view(-1).scatter(0, (rows * (sinks + 1) + slot).flatten(), places.flatten())
    index = index.view(sequences, sinks + 1)[:, :sinks]
    sink_key, sink_value = (_gather(x, index, segments is not None) for x in (key, value))
    # A call without queries has none that a missing sink could come after.
    never = max(length, 1)
    first = (index if is_causal else torch.zeros_like(index)).where(index >= 0, never)
    if state is not None:
        assert state.sink_mask is not None
        assert state.sink_key is not None
        assert state.sink_value is not None
        held = state.sink_mask[:, None, :, None]
        sink_key = state.sink_key.to(key.dtype).where(held, sink_key)
        sink_value = state.sink_value.to(value.dtype).where(held, sink_value)
        first = first.masked_fill(state.sink_mask, 0)
    return SinkKeys(sink_key, sink_value, first, index), taking & ~is_sink


def _gather(x: Tensor, index: Tensor, packed: bool) -> Tensor:
    """Rows of ``x`` ``(batch, heads, S, D)`` as ``(sequences, heads, n, D)``, zeros for -1."""
    known = (index >= 0)[:, None, :, None]
    index = index.clamp_min(0)
    if packed:
        rows = x[0][:, index].movedim(1, 0)
    elif x.shape[2] == 0:
        rows = x.new_zeros(*x.shape[:2], index.shape[1], x.shape[3])
    else:
        rows = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return rows.where(known, 0.0)


def join_recent(
    state: FavorState, key: Tensor, value: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask with those that the state kept in front."""
    assert state.recent_key is not None
    assert state.recent_value is not None
    assert state.recent_mask is not None
    if key_mask is None:
        key_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return (
        torch.cat((state.recent_key.to(key.dtype), key), dim=2),
        torch.cat((state.recent_value.to(value.dtype), value), dim=2),
        torch.cat((state.recent_mask, key_mask), dim=1),
    )


def complete_state(problem: AttentionProblem, sums: FavorState) -> FavorState:
    """The state after a call: the backend's sums, and the keys that stay exact."""
    recent_key = recent_value = recent_mask = None
    if problem.window is not None:
        missing = max(0, problem.window - problem.key.shape[2])
        first = problem.key.shape[2] + missing - problem.window
        mask = problem.key_mask
        if mask is None:
            mask = torch.ones(
                problem.key.shape[0],
                problem.key.shape[2],
                dtype=torch.bool,
                device=problem.key.device,
            )
        recent_key, recent_value = (
            F.pad(x[:, :, first:], (0, 0, missing, 0)) for x in (problem.key, problem.value)
        )
        recent_mask = F.pad(mask[:, first:], (missing, 0))
    sink_key = sink_value = sink_mask = None
    if problem.sinks is not None:
        sink_key, sink_value = problem.sinks.key, problem.sinks.value
        sink_mask = problem.sinks.first < max(problem.query.shape[-2], 1)
    return FavorState(
        sums.key_value,
        sums.key_sum,
        sums.log_scale,
        recent_key,
        recent_value,
        recent_mask,
        sink_key,
        sink_value,
        sink_mask,
    )
