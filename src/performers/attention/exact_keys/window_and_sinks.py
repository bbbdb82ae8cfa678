"""The keys that are met exactly: a window around each query, and the first keys of a sequence.

Attention splits the keys of a query in two (Chen et al. 2021, Scatterbrain, arXiv 2110.15343): a
sparse set ``S_i`` that is met with ``exp(scale q . k)`` itself, and the rest, met through features,
under one normaliser:

    out_i = (sum_{S_i} e^{s q_i . k_j} v_j + sum_{rest} K(q_i, k_j) v_j) / (the same without v_j)

No key is in both sums, so numerator and denominator stay unbiased, and nothing is subtracted.
This module finds the sinks, joins what a state held with what a call brings, and collects what the
next call will need.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.state import FavorState
from performers.features import FeatureForm

if TYPE_CHECKING:
    from performers.attention.call import AttentionCall


class SinkKeys(NamedTuple):
    """The first keys of each sequence, exact for every query that sees them.

    Attributes:
        key: Shape ``(sequences, key_heads, sinks, head_dim)``; ``sequences`` is the batch, or the
            number of packed sequences.
        value: Shape ``(sequences, key_heads, sinks, value_dim)``.
        first: Shape ``(sequences, sinks)``, int64: the first query, as an index into the length
            axis, that sees the sink; the length for a sink that is not there.
        place: Shape ``(sequences, sinks)``, int64: where the sink stands among the keys of this
            call, or -1 for one that a state held or that is not there.
    """

    key: Tensor
    value: Tensor
    first: Tensor
    place: Tensor


def check_window_and_sinks(call: "AttentionCall", form: FeatureForm) -> None:
    """Check the options ``window`` and ``sinks`` of a call.

    Raises:
        ValueError: One is no count, or does not go with the features or the lengths.
    """
    for name, value, kind in (
        ("window", call.window, "an integer >= 0 or None"),
        ("sinks", call.sinks, "an integer >= 0"),
    ):
        if name == "window" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be {kind}, got {value!r}")
        if (name == "window" or value) and not form.estimates_softmax():
            raise ValueError(
                f"{name} needs a feature map that estimates the softmax kernel (SoftmaxFeatures): "
                f"exact terms exp(q . k) cannot be added to another kernel, got {name}={value}"
            )
    length, size = call.query.shape[2], call.key.shape[2]
    if call.window is not None and length != size:
        raise ValueError(
            f"window needs as many keys as queries, got {size} keys and {length} queries; for "
            "cross attention pass window=None"
        )


def find_sinks_(call: "AttentionCall") -> None:
    """Set the first ``sinks`` keys that take part, of every sequence, apart from the others."""
    sinks, key, value = call.sinks, call.key, call.value
    segments, state = call.segments, call.state
    batch, size = key.shape[0], key.shape[2]
    taking = every_key(key) if call.key_mask is None else call.key_mask
    rank = taking.long().cumsum(1)
    rows = torch.arange(batch, device=key.device).unsqueeze(1).expand(batch, size)
    sequences = batch
    if segments is not None and call.cu_seqlens is not None:
        sequences, rows = len(call.cu_seqlens) - 1, segments.unsqueeze(0)
        # Ranks within a segment: less the largest of the segments before it.
        before = torch.zeros(sequences + 1, dtype=torch.int64, device=key.device)
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
    never = max(call.query.shape[-2], 1)
    first = (index if call.is_causal else torch.zeros_like(index)).where(index >= 0, never)
    if state is not None:
        assert state.sink_mask is not None
        assert state.sink_key is not None
        assert state.sink_value is not None
        held = state.sink_mask[:, None, :, None]
        sink_key = state.sink_key.to(key.dtype).where(held, sink_key)
        sink_value = state.sink_value.to(value.dtype).where(held, sink_value)
        first = first.masked_fill(state.sink_mask, 0)
    call.sink_keys = SinkKeys(sink_key, sink_value, first, index)
    call.key_mask = taking & ~is_sink


def _gather(x: Tensor, index: Tensor, packed: bool) -> Tensor:
    """Rows of ``x`` ``(batch, heads, S, D)`` as ``(sequences, heads, n, D)``, zeros for -1."""
    known = (index >= 0)[:, None, :, None]
    index = index.clamp_min(0)
    if x.shape[2] == 0:
        rows = x.new_zeros(index.shape[0], x.shape[1], index.shape[1], x.shape[3])
    elif packed:
        rows = x[0][:, index].movedim(1, 0)
    else:
        rows = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return rows.where(known, 0.0)


def join_recent_(call: "AttentionCall") -> None:
    """Put the keys that the state kept in front of those of the call."""
    state, mask = call.state, call.key_mask
    assert state is not None
    assert state.recent_key is not None
    assert state.recent_value is not None
    assert state.recent_mask is not None
    assert call.window is not None
    mask = every_key(call.key) if mask is None else mask
    call.key = torch.cat((state.recent_key.to(call.key.dtype), call.key), dim=2)
    call.value = torch.cat((state.recent_value.to(call.value.dtype), call.value), dim=2)
    call.key_mask = torch.cat((state.recent_mask, mask), dim=1)
    call.offset = call.window


def complete_state(call: "AttentionCall", sums: FavorState) -> FavorState:
    """The state after a call: the backend's sums, and the keys that stay exact."""
    recent: tuple[Tensor | None, ...] = (None, None, None)
    if call.window is not None:
        missing = max(0, call.window - call.key.shape[2])
        first = call.key.shape[2] + missing - call.window
        mask = every_key(call.key) if call.key_mask is None else call.key_mask
        recent = (
            *(F.pad(x[:, :, first:], (0, 0, missing, 0)) for x in (call.key, call.value)),
            F.pad(mask[:, first:], (missing, 0)),
        )
    sinks: tuple[Tensor | None, ...] = (None, None, None)
    if call.sink_keys is not None:
        seen = call.sink_keys.first < max(call.query.shape[-2], 1)
        sinks = (call.sink_keys.key, call.sink_keys.value, seen)
    return FavorState(sums.key_value, sums.key_sum, sums.log_scale, *recent, *sinks)


def every_key(key: Tensor) -> Tensor:
    """A mask ``(batch, S)`` of all keys."""
    return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
