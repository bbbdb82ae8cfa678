"""Attention of one shard: what this rank publishes, and calls between what it receives."""

from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from performers.attention.backends import resolve_backend
from performers.attention.call import AttentionCall, masked
from performers.attention.exact_keys.window_and_sinks import SinkKeys, find_sinks_
from performers.attention.key_sums import key_sums
from performers.attention.state import FavorState
from performers.attention.torch_backend.blocks import (
    Features,
    Rows,
    Sums,
    block_rows,
    block_sizes,
    in_blocks,
    read,
)
from performers.distributed.layout import Layout, Piece
from performers.distributed.messages import Keys, Message, exchange, gather, merged
from performers.features.precision import without_autocast


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
    rank. ``call`` is checked, of all local positions, without sinks and boundaries; ``packed`` says
    that the row has several sequences.
    """
    pieces = [layout.head] if layout.tail == layout.head else [layout.head, layout.tail]
    parts = [call.sliced(piece.start, piece.stop) for piece in pieces]
    if sinks:
        _find_sinks_(parts, layout.head, sinks, group)
    # Every rank sends as many messages as the others, whatever its sequences.
    published = [0, -1] if packed and not call.is_causal else [-1]
    received, size = exchange([_message(parts[i]) for i in published], group, call.dtype)
    outs = _attend_piece(parts[0], layout.head, received, backend)
    ends = layout.inner if call.is_causal else layout.inner[:-1]
    if len(ends) > 1:
        inner = _packed(call, ends, sinks)
        outs.append(resolve_backend(backend, inner).attend(inner)[0])
    if len(parts) > 1 and not call.is_causal:
        outs += _attend_piece(parts[1], layout.tail, received, backend)
    # In this order the heads of a position lie together: a model joins them without a copy.
    return torch.cat([x.movedim(3, 1) for x in outs], dim=1).movedim(1, 3), size


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
    # Keys that take part.
    counts = [part.valid_keys().long().sum(1) for part in (parts[0], parts[-1])]
    last = gather(torch.stack(counts), group)[:, 1]
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
    mask = call.valid_keys()[:, start:stop]
    key, value = (
        F.pad(masked(x[:, :, start:stop], mask), (0, 0, *missing)) for x in (call.key, call.value)
    )
    return Keys(key, value, F.pad(mask, missing))


class _Side(NamedTuple):
    """Keys of a sequence on the ranks before this one, or on those after it.

    Attributes:
        total: Sums over all of them.
        far: Sums over those beyond the halo.
        halo: The nearest, as many as the window, the very nearest last; or None.
    """

    total: Sums
    far: Sums
    halo: Keys | None

    def reach(self, call: AttentionCall) -> int:
        """The number of queries of a call whose window reaches these keys."""
        return 0 if self.halo is None else min(call.window or 0, call.query.shape[-2])

    def before(self, call: AttentionCall) -> AttentionCall:
        """A causal call after these keys."""
        assert self.halo is not None
        key, value, mask = self.halo
        return call.replaced(
            key=torch.cat((key.to(call.key.dtype), call.key), dim=2),
            value=torch.cat((value.to(call.value.dtype), call.value), dim=2),
            key_mask=torch.cat((mask, call.valid_keys()), dim=1),
            offset=mask.shape[1],
            state=FavorState(*self.far),
        )


def _attend_piece(
    call: AttentionCall, piece: Piece, received: list[list[Message]], backend: str | None
) -> list[Tensor]:
    """The output of a sequence between its parts on other ranks, as consecutive parts."""
    like, scaled = received[0][0].total, call.form.kind != "elementwise"
    before = [received[rank][-1] for rank in reversed(piece.before)]
    after = [received[rank][0] for rank in piece.after]
    if call.sink_keys is not None:
        _add_sinks_(call, before if call.is_causal else [*before, *after])

    def side(ranks: list[Message], beyond: Sums | None, halo: Keys | None) -> _Side:
        total = far = merged([x.total for x in ranks], like, scaled=scaled)
        if beyond is not None:
            far = merged([beyond, *(x.total for x in ranks[1:])], like, scaled=scaled)
        return _Side(total, far, halo)

    past = side(before, *((before[0].front, before[0].right) if before else (None, None)))
    if call.is_causal:
        return _attend_after(call, past, backend)
    future = side(after, *((after[0].back, _mirrored(after[0].left)) if after else (None, None)))
    return _attend_between(call, past, future, backend)


def _attend_after(call: AttentionCall, past: _Side, backend: str | None) -> list[Tensor]:
    """A causal call after the keys of other ranks.

    Queries whose window reaches these are a call of their own: the halo is put before few keys, and
    the others are not copied.
    """
    reach = past.reach(call)
    near, rest = call.query.split((reach, call.query.shape[-2] - reach), -2)
    calls = [past.before(call.sliced(0, reach).replaced(query=near))] if reach else []
    if rest.shape[-2]:
        state = FavorState(*past.total)
        calls.append(call.replaced(query=rest, offset=reach, state=state))
        if call.sink_keys is not None:
            first = (call.sink_keys.first - reach).clamp_min(0)
            calls[-1].sink_keys = call.sink_keys._replace(first=first)
    return [resolve_backend(backend, x).attend(x)[0] for x in calls]


def _attend_between(
    call: AttentionCall, past: _Side, future: _Side, backend: str | None
) -> list[Tensor]:
    """A bidirectional call between the keys of other ranks.

    Rows over its own keys are joined with those over sums of the others and, for queries whose
    window reaches there, with those over a halo.
    """
    call, length = call.replaced(is_part=True), call.query.shape[-2]
    attend_part = resolve_backend(backend, call).attend_part
    assert attend_part is not None
    own = attend_part(call)
    left, right = past.reach(call), length - future.reach(call)
    # Causal calls meet the halos, of the reversed row on the right. Their own keys are hidden.
    hidden = torch.zeros_like(call.valid_keys())
    edge = call.replaced(is_causal=True, sink_keys=None, key_mask=hidden)
    first = last = own
    if left:
        first = attend_part(past.before(edge.sliced(0, left)))
    if right < length:
        edge = edge.sliced(right, length)
        found = attend_part(future.before(edge.replaced(query=edge.query.flip(-2))))
        last = Rows(*(x.flip(-2) for x in found))
    outs, cuts = [], sorted({0, left, right, length})
    sizes = [stop - start for start, stop in pairwise(cuts)]
    tensors = zip(*(x.split(sizes, -2) for x in (call.query, *own)), strict=True)
    for (start, stop), (query, *fields) in zip(pairwise(cuts), tensors, strict=True):
        sums = []
        if stop <= left:
            fields += [x[..., start:stop, :] for x in first]
        else:
            sums.append(past.total)
        if start >= right:
            fields += [x[..., start - right : stop - right, :] for x in last]
        else:
            sums.append(future.total)
        outs.append(_joined(call, query, sums, fields))
    return outs


def _joined(call: AttentionCall, query: Tensor, sums: list[Sums], fields: list[Tensor]) -> Tensor:
    """The output from sums over keys and from rows, whose fields follow each other."""
    features, groups = Features.of_call(call), call.query.shape[2]

    def step(query: Tensor, *fields: Tensor) -> tuple[Tensor]:
        rows = [Rows(*fields[i : i + 3]) for i in range(0, len(fields), 3)]
        if sums:
            remote = read(features, query, reduce(Sums.plus, sums))
            exact = call.has_exact_pairs()
            rows.append(features.beside_exact_pairs(remote, query) if exact else remote)
        return (reduce(Rows.plus, rows).out(),)

    size = max(1, block_rows(call.key.shape[:2], features, query.device) // groups)
    with without_autocast(query.device):
        sizes = block_sizes(query.shape[-2], size)
        return in_blocks(step, sizes, [(x, 3) for x in (query, *fields)])[0][0]


def _mirrored(keys: Keys | None) -> Keys | None:
    """The keys in reversed order."""
    if keys is None:
        return None
    return Keys(keys.key.flip(2), keys.value.flip(2), keys.mask.flip(1))


def _add_sinks_(call: AttentionCall, messages: list[Message]) -> None:
    """Add the sinks of the sequence that other ranks hold."""
    assert call.sink_keys is not None
    key, value, first, place = call.sink_keys
    for message in messages:
        assert message.sinks is not None
        key = key + message.sinks.key.to(key.dtype)
        value = value + message.sinks.value.to(value.dtype)
        first = first.masked_fill(message.sinks.mask, 0)
    call.sink_keys = SinkKeys(key, value, first, place)
