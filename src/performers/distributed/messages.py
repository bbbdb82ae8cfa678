"""Messages between the ranks of a row: one for each attention call, of a size without length.

A rank publishes, for its last sequence and in bidirectional calls also for its first, sums over its
keys, the keys next to its edges, and its sinks. One ``all_gather`` takes them to all ranks; in the
backward pass one ``all_reduce`` sums the gradients. Every rank takes part in both, whatever it
uses: a rank that left one out would leave the others waiting.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from performers.attention.torch_backend.blocks import Sums, finite


class Keys(NamedTuple):
    """Keys and values ``(B, H, n, D)``, and those that take part, ``(B, n)``."""

    key: Tensor
    value: Tensor
    mask: Tensor


class Message(NamedTuple):
    """Keys of one sequence on one rank.

    Attributes:
        total: Sums over all keys but sinks.
        front: Sums over those without the last ``window``; ``total`` without window.
        back: Sums over those without the first ``window``; ``total`` without window.
        left: The first ``window`` keys.
        right: The last ``window`` keys.
        sinks: The sinks of the sequence that this rank holds.
    """

    total: Sums
    front: Sums
    back: Sums
    left: Keys | None
    right: Keys | None
    sinks: Keys | None


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Tensors of one shape of all ranks, stacked."""
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    return gathered


class _Gather(torch.autograd.Function):
    """Tensors of all ranks; their gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(message, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def exchange(
    messages: Sequence[Message], group: dist.ProcessGroup, dtype: torch.dtype
) -> tuple[list[list[Message]], int]:
    """Messages of all ranks, by rank, and the bytes of a rank's."""
    # Within a message, a tensor that stands in two places travels once.
    fields = [{id(x): x for part in message for x in part or ()} for message in messages]
    tensors = [x for named in fields for x in named.values()]
    packed = torch.cat([x.to(dtype).flatten() for x in tensors])
    gathered = _Gather.apply(packed, group)

    def unpacked(row: Tensor) -> list[Message]:
        parts = iter(row.split([x.numel() for x in tensors]))
        received = []
        for message, named in zip(messages, fields, strict=True):
            of = {
                key: part if x.dtype != torch.bool else part > 0.5
                for (key, x), part in (
                    ((key, x), next(parts).view(x.shape)) for key, x in named.items()
                )
            }
            received.append(_replaced(message, of))
        return received

    return [unpacked(row) for row in gathered.unbind(0)], packed.nbytes


def _replaced(message: Message, of: dict[int, Tensor]) -> Message:
    """The message with other tensors in the places of its own."""
    total, front, back = (Sums(*(of[id(x)] for x in part)) for part in message[:3])
    left, right, sinks = (
        None if part is None else Keys(*(of[id(x)] for x in part)) for part in message[3:]
    )
    return Message(total, front, back, left, right, sinks)


def merged(parts: list[Sums], like: Sums, *, scaled: bool) -> Sums:
    """Sums over the keys of all parts, whose scales are zero unless ``scaled``.

    Without any they are zeros that are still in the graph of ``like``: the backward pass of an
    exchange needs every rank.
    """
    if not parts:
        never = torch.zeros((), dtype=torch.bool, device=like.key_sum.device)
        return Sums(
            like.key_value.where(never, 0.0),
            like.key_sum.where(never, 0.0),
            torch.full_like(like.log_scale, -math.inf if scaled else 0.0),
        )
    key_value, key_sum, log_scale = (torch.stack(x) for x in zip(*parts, strict=True))
    log_scale = log_scale.detach()
    peak = log_scale.amax(0)
    weights = (log_scale - finite(peak)).exp()
    return Sums((key_value * weights.unsqueeze(-1)).sum(0), (key_sum * weights).sum(0), peak)
