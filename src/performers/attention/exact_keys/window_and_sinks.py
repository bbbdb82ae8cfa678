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

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


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
    """Check the options ``window``, ``sinks`` and ``positions`` of a call.

    Raises:
        ValueError: One does not fit the features, the shapes or another option.
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
    if call.positions is not None:
        _check_positions(call, call.positions)


def _check_positions(call: "AttentionCall", positions: Tensor) -> None:
    shape = (call.key.shape[0], call.key.shape[2])
    if positions.shape != shape or positions.dtype not in _INTEGERS:
        raise ValueError(
            f"positions must be integers of shape {shape}, one for each key, got "
            f"{positions.dtype} {tuple(positions.shape)}"
        )
    if call.window is None:
        raise ValueError("positions needs window, which is measured in them")
    for name in ("listed_keys", "neighbours"):
        if getattr(call, name) is not None:
            raise ValueError(f"positions cannot be combined with {name}; leave one of the two out")
    if call.is_causal:
        raise ValueError(
            "positions needs is_causal=False: keys within a window of positions come later in the "
            "row"
        )


def find_sinks_(call: "AttentionCall") -> None:
    """Set the first ``sinks`` keys that take part, of every sequence, apart from the others."""
    sinks, key, value = call.sinks, call.key, call.value
    segments, batch, size = call.segments, key.shape[0], key.shape[2]
    held = None if call.state is None else call.state.exact_keys("sink")
    valid = call.valid_keys()
    rank = valid.long().cumsum(1)
    rows = torch.arange(batch, device=key.device).unsqueeze(1).expand(batch, size)
    sequences = batch
    if segments is not None and call.cu_seqlens is not None:
        sequences, rows = len(call.cu_seqlens) - 1, segments.unsqueeze(0)
        # Ranks within a segment: less the largest of the segments before it.
        before = torch.zeros(sequences + 1, dtype=torch.int64, device=key.device)
        before = before.scatter_reduce(0, segments + 1, rank[0], "amax").cummax(0).values
        rank = rank - before[segments]
    if held is not None:
        rank = rank + held[2].sum(1, keepdim=True)
    is_sink = valid & (rank <= sinks)
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
    if held is not None:
        held_key, held_value, mask = held
        sink_key = held_key.to(key.dtype).where(mask[:, None, :, None], sink_key)
        sink_value = held_value.to(value.dtype).where(mask[:, None, :, None], sink_value)
        first = first.masked_fill(mask, 0)
    call.sink_keys = SinkKeys(sink_key, sink_value, first, index)
    call.key_mask = valid & ~is_sink


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
    recent = None if call.state is None else call.state.exact_keys("recent")
    assert recent is not None
    key, value, mask = recent
    call.key_mask = torch.cat((mask, call.valid_keys()), dim=1)
    call.key = torch.cat((key.to(call.key.dtype), call.key), dim=2)
    call.value = torch.cat((value.to(call.value.dtype), call.value), dim=2)
    call.offset = mask.shape[1]


def complete_state(call: "AttentionCall", sums: FavorState) -> FavorState:
    """The state after a call: the backend's sums, and the keys that stay exact."""
    recent: tuple[Tensor | None, ...] = (None, None, None)
    if call.window is not None:
        missing = max(0, call.window - call.key.shape[2])
        first = call.key.shape[2] + missing - call.window
        recent = (
            *(F.pad(x[:, :, first:], (0, 0, missing, 0)) for x in (call.key, call.value)),
            F.pad(call.valid_keys()[:, first:], (missing, 0)),
        )
    sinks: tuple[Tensor | None, ...] = (None, None, None)
    if call.sink_keys is not None:
        seen = call.sink_keys.first < max(call.query.shape[-2], 1)
        sinks = (call.sink_keys.key, call.sink_keys.value, seen)
    return FavorState(*sums.sums(), *recent, *sinks)
