"""Messages between ranks, one per attention call, whose size does not depend on the row's length.

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
        front: Sums over those without the last ``window``, or None without window.
        back: Sums over those without the first ``window``, or None without window and for causal
            calls.
        left: The first ``window`` keys, or None as ``back``.
        right: The last ``window`` keys, or None as ``front``.
        sinks: The sinks of the sequence that this rank holds, or None.
    """

    total: Sums
    front: Sums | None = None
    back: Sums | None = None
    left: Keys | None = None
    right: Keys | None = None
    sinks: Keys | None = None


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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """This rank's of the tensors that all ranks have for each, summed; without a derivative.

    ``once_differentiable`` would leave it out of ``torch.autograd.grad``, which then ends with
    wrong numbers in place of an error.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, group: dist.ProcessGroup) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return grad[dist.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "attention inside performers.distributed.sequence_parallel has no second derivative: "
            "compute gradients of gradients outside the context, on whole rows"
        )


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the tensors of all ranks, whose gradient is the sum of theirs."""
    return _Gather.apply(x, group).sum(0)


def exchange(
    messages: Sequence[Message], group: dist.ProcessGroup, dtype: torch.dtype
) -> tuple[list[list[Message]], int]:
    """Messages of all ranks, by rank, and the bytes of a rank's."""
    tensors = [x for message in messages for part in message if part is not None for x in part]
    packed = torch.cat([x.to(dtype).flatten() for x in tensors])
    sizes = [x.numel() for x in tensors]

    def unpacked(row: Tensor) -> list[Message]:
        numbers = iter(row.split(sizes))

        def restored(like: Any) -> Any:
            if isinstance(like, tuple):
                return type(like)(*map(restored, like))
            if like is None:
                return None
            found = next(numbers).view(like.shape)
            return found > 0.5 if like.dtype == torch.bool else found

        return [restored(message) for message in messages]

    return [unpacked(row) for row in _Gather.apply(packed, group).unbind()], packed.nbytes


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
