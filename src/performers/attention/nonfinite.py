"""NaN and infinity among the inputs: one rule, whatever the algorithm.

A row is NaN if its query, or a key or value that it attends to, holds NaN or infinity, and no
other row is touched. Sums would not keep to that: a weight of zero times NaN is NaN, and a feature
of a key at infinity can be zero. So algorithms run on inputs with zeros in place of such keys and
values, and the rows that see one are marked.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.window_and_sinks import SinkKeys
from performers.attention.state import FavorState
from performers.features.recomputation import is_traced, is_transformed

if TYPE_CHECKING:
    from performers.attention.operators import Inputs


class Touched(NamedTuple):
    """Rows that NaN and infinity reach.

    Attributes:
        key: Keys and values that hold some, shape ``(batch, key_heads, S)``, bool.
        sink: Sinks that do, shape ``(sequences, key_heads, sinks)``, or None.
        rows: Rows that see one, or whose query holds some, shape
            ``(batch, key_heads, groups, L)``.
        sums: Whether the sums over keys that a call returns hold one, shape ``(batch, key_heads)``.
    """

    key: Tensor
    sink: Tensor | None
    rows: Tensor
    sums: Tensor

    def marked(self, out: Tensor, state: FavorState | None) -> tuple[Tensor, FavorState | None]:
        """Rows ``(batch, key_heads, groups, L, n)`` and sums, NaN where they hold or see some."""
        out = out * _nan_where(self.rows.unsqueeze(-1), out)
        if state is None:
            return out, None
        key_value, key_sum = (
            x * _nan_where(self.sums.view(*self.sums.shape, *[1] * (x.ndim - 2)), x)
            for x in (state.key_value, state.key_sum)
        )
        return out, FavorState(key_value, key_sum, state.log_scale)


def without_nonfinite(call: AttentionCall) -> tuple[AttentionCall, Touched | None]:
    """The call with zeros for keys and values that hold NaN or infinity, and what sees them.

    None where there is nothing to see.
    """
    sinks = call.sink_keys
    if _all_finite([call.query, call.key, call.value, *([] if sinks is None else sinks[:2])]):
        return call, None
    found = touched(call)
    if sinks is not None and found.sink is not None:
        key, value = (zeroed(x, found.sink) for x in (sinks.key, sinks.value))
        # torch 2.7 compiles no _replace of a named tuple.
        sinks = SinkKeys(key, value, sinks.first, sinks.place)
    finite = call.replaced(
        key=zeroed(call.key, found.key), value=zeroed(call.value, found.key), sink_keys=sinks
    )
    return finite, found


def zeroed(x: Tensor, where: Tensor) -> Tensor:
    """``x`` with zeros in the rows that are marked."""
    return x.masked_fill(where.unsqueeze(-1), 0.0)


def touched(call: "AttentionCall | Inputs") -> Touched:
    """Find NaN and infinity, and the rows that see them."""
    query, key, sinks, segments = call.query, call.key, call.sink_keys, call.segments
    length, size = query.shape[-2], key.shape[-2]
    bad = _holds_some(key) | _holds_some(call.value)
    if call.key_mask is not None:
        bad = bad & call.key_mask.unsqueeze(1)
    # Of the keys before each position, and up to where the keys that a row sees begin and end.
    count = F.pad(bad.cumsum(-1), (1, 0))
    before, until = count[..., :1], count[..., -1:]
    places = torch.arange(length, device=query.device)
    if segments is not None:
        before = count[..., torch.searchsorted(segments, segments)]
        until = count[..., torch.searchsorted(segments, segments, right=True)]
    if call.is_causal:
        until = count[..., places + call.offset + 1]
    rows = (until > before).unsqueeze(2) | _holds_some(query)
    sink = None
    if sinks is not None:
        sink = _holds_some(sinks.key) | _holds_some(sinks.value)
        # Each query and the sinks of its sequence, shape (batch, key_heads, L, sinks).
        if segments is None:
            first, held = sinks.first[:, None, None], sink.unsqueeze(2)
        else:
            first, held = sinks.first[segments], sink[segments].movedim(0, 1).unsqueeze(0)
        rows = rows | ((places.unsqueeze(-1) >= first) & held).any(-1).unsqueeze(2)
    return Touched(bad, sink, rows, bad[..., : max(0, size - (call.window or 0))].any(-1))


def _all_finite(tensors: list[Tensor]) -> bool:
    """True if all is seen to be finite; False where looking is not possible, or not cheap."""
    if torch.compiler.is_compiling() or is_traced() or is_transformed():
        return False
    # Reading a number stops a GPU, and subclasses (fake tensors) may have none.
    if any(x.device.type != "cpu" or type(x) is not Tensor for x in tensors):
        return False
    # A sum is the fastest look; one that overflows costs time only.
    with torch.no_grad():
        total = sum(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    return math.isfinite(total)


def _nan_where(mask: Tensor, like: Tensor) -> Tensor:
    # A factor: the gradient of a row that is NaN must not be a number.
    return like.new_ones(()).where(~mask, torch.nan)


def _holds_some(x: Tensor) -> Tensor:
    return ~x.detach().isfinite().all(-1)
