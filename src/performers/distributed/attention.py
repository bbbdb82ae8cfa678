"""Attention of one shard: what this rank publishes, and calls between what it receives."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from performers.attention.backends import resolve_backend
from performers.attention.call import AttentionCall, masked
from performers.attention.exact_keys.window_and_sinks import SinkKeys, find_sinks_
from performers.attention.key_sums import key_sums
from performers.attention.state import FavorState
from performers.distributed.layout import Layout, Piece
from performers.distributed.messages import Keys, Message, exchange, gather, merged


def attend_shard(
    call: AttentionCall,
    layout: Layout,
    sinks: int,
    group: dist.ProcessGroup,
    backend: str | None,
    *,
    packed: bool,
) -> tuple[Tensor, int]:
    """The output for a shard, and the bytes of its message.

    The first sequence, and of bidirectional calls the last, is a call of its own between what other
    ranks sent. The others are one packed call: a causal sequence that begins here needs no other
    rank.

    Args:
        call: Checked, of all local positions, without sinks and boundaries.
        layout: The local sequences.
        sinks: How many first keys of a sequence are exact.
        group: The processes of the row.
        backend: As in ``favor_attention``.
        packed: Whether the row has several sequences.
    """
    pieces = [layout.head] if layout.tail == layout.head else [layout.head, layout.tail]
    parts = [call.sliced(piece.start, piece.stop) for piece in pieces]
    if sinks:
        _find_sinks_(parts, layout.head, sinks, group)
    # Every rank sends as many messages as the others, whatever its sequences.
    published = [0, -1] if packed and not call.is_causal else [-1]
    received, size = exchange([_message(parts[i]) for i in published], group, call.dtype)
    outs = [_attend_between(parts[0], layout.head, received, backend)]
    ends = layout.inner if call.is_causal else layout.inner[:-1]
    if len(ends) > 1:
        inner = _packed(call, ends, sinks)
        outs.append(resolve_backend(backend, inner).attend(inner)[0])
    if len(parts) > 1 and not call.is_causal:
        outs.append(_attend_between(parts[1], layout.tail, received, backend))
    return torch.cat(outs, dim=3), size


def _packed(call: AttentionCall, ends: tuple[int, ...], sinks: int) -> AttentionCall:
    """The sequences between ``ends`` of a shard."""
    call = call.sliced(ends[0], ends[-1])
    call.cu_seqlens = torch.tensor(ends, device=call.query.device) - ends[0]
    places = torch.arange(ends[-1] - ends[0], device=call.query.device)
    call.segments = torch.bucketize(places, call.cu_seqlens[1:], right=True)
    call.sinks = sinks
    if sinks:
        find_sinks_(call)
    return call


def _find_sinks_(
    parts: list[AttentionCall], head: Piece, sinks: int, group: dist.ProcessGroup
) -> None:
    """Set the sinks of the first and the last sequence apart, after those on earlier ranks."""
    own = torch.stack([_count(parts[0]), _count(parts[-1])])
    last = gather(own, group)[:, 1]
    for part in parts:
        before = torch.zeros_like(last[0])
        if part is parts[0]:
            for rank in head.before:
                before = before + last[rank]
        key, value = part.key, part.value
        part.sinks = sinks
        # Those on earlier ranks are counted like the ones that a state holds.
        part.state = FavorState(
            *part.past().sums(),
            sink_key=key.new_zeros((*key.shape[:2], sinks, key.shape[3])),
            sink_value=value.new_zeros((*value.shape[:2], sinks, value.shape[3])),
            sink_mask=torch.arange(sinks, device=key.device) < before.unsqueeze(1),
        )
        find_sinks_(part)
        part.state = None


def _count(call: AttentionCall) -> Tensor:
    """Keys that take part, ``(B,)``."""
    return call.taking().long().sum(1)


def _message(call: AttentionCall) -> Message:
    """Sums, edges and sinks of one sequence on this rank."""
    size, window = call.key.shape[2], call.window or 0
    sinks = None
    if call.sink_keys is not None:
        key, value, _, place = call.sink_keys
        sinks = Keys(key, value, place >= 0)
    if not window:
        return Message(key_sums(call, 0, size), sinks=sinks)
    kept = min(size, window)
    right = _edge(call, size - kept, size, (window - kept, 0))
    if call.is_causal:
        front = key_sums(call, 0, size - kept)
        total = front.plus(key_sums(call, size - kept, size))
        return Message(total, front, right=right, sinks=sinks)
    left = _edge(call, 0, kept, (0, window - kept))
    first, second = sorted((kept, size - kept))
    begin, middle, end = (
        key_sums(call, *cut) for cut in ((0, first), (first, second), (second, size))
    )
    total = begin.plus(middle).plus(end)
    if kept <= size - kept:
        return Message(total, begin.plus(middle), middle.plus(end), left, right, sinks)
    return Message(total, begin, end, left, right, sinks)


def _edge(call: AttentionCall, start: int, stop: int, missing: tuple[int, int]) -> Keys:
    """Some keys, with ``missing`` ones that take no part before and after them."""
    mask = call.taking()[:, start:stop]
    key, value = (
        F.pad(masked(x[:, :, start:stop], mask), (0, 0, *missing)) for x in (call.key, call.value)
    )
    return Keys(key, value, F.pad(mask, missing))


def _attend_between(
    call: AttentionCall, piece: Piece, received: list[list[Message]], backend: str | None
) -> Tensor:
    """The output of a sequence, or a part of one, between its parts on other ranks."""
    length, window = call.query.shape[-2], call.window or 0
    scaled = call.form.kind != "elementwise"
    before = [received[rank][-1] for rank in piece.before]
    after = [received[rank][0] for rank in piece.after]
    like = received[0][0].total
    past = [*(x.total for x in before[:-1]), *(x.front or x.total for x in before[-1:])]
    call = call.replaced(state=FavorState(*merged(past, like, scaled=scaled)))
    if not call.is_causal:
        future = [*(x.back or x.total for x in after[:1]), *(x.total for x in after[1:])]
        call.following = FavorState(*merged(future, like, scaled=scaled))
    if window:
        halo = [before[-1].right if before else None, Keys(call.key, call.value, call.taking())]
        call.offset = window
        if not call.is_causal:
            # The keys of the halo get queries, whose rows are not kept.
            halo.append(after[0].left if after else None)
            call.query, call.offset = F.pad(call.query, (0, 0, window, window)), 0
        call.key, call.value, call.key_mask = _joined(halo, window)
    if call.sink_keys is not None:
        call.sink_keys = _all_sinks(call, before, after)
    out = resolve_backend(backend, call).attend(call)[0]
    return out if call.is_causal else out[..., window : window + length, :]


def _joined(parts: list[Keys | None], window: int) -> Keys:
    """Keys one after the other; ``window`` keys that take no part for None."""
    own = parts[1]
    assert own is not None
    none = Keys(
        own.key.new_zeros((*own.key.shape[:2], window, own.key.shape[3])),
        own.value.new_zeros((*own.value.shape[:2], window, own.value.shape[3])),
        own.mask.new_zeros((own.mask.shape[0], window)),
    )
    keys, values, masks = zip(*(none if part is None else part for part in parts), strict=True)
    return Keys(
        torch.cat([x.to(own.key.dtype) for x in keys], dim=2),
        torch.cat([x.to(own.value.dtype) for x in values], dim=2),
        torch.cat(masks, dim=1),
    )


def _all_sinks(call: AttentionCall, before: list[Message], after: list[Message]) -> SinkKeys:
    """Sinks of a sequence on all ranks whose keys these queries see."""
    assert call.sink_keys is not None
    key, value, first, place = call.sink_keys
    if not call.is_causal:
        # All queries see all sinks, those of the halo included; none a sink that is not there.
        first = torch.full_like(first, call.query.shape[-2]).masked_fill(place >= 0, 0)
    for message in before if call.is_causal else [*before, *after]:
        assert message.sinks is not None
        key = key + message.sinks.key.to(key.dtype)
        value = value + message.sinks.value.to(value.dtype)
        first = first.masked_fill(message.sinks.mask, 0)
    return SinkKeys(key, value, first, place)
