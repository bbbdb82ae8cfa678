"""Rows of a batch over the processes that share them: cuts, sums, and losses of one row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from performers.distributed import shard
from performers.distributed.batches import with_least_length
from performers.distributed.messages import summed


@dataclass(frozen=True)
class Row:
    """The processes that share each row of a batch, in consecutive shards.

    Attributes:
        group: The processes; None: this one has whole rows.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def whole_batch(self, inputs: Mapping[str, Any], *, window: int, pad: int) -> dict[str, Tensor]:
        """The batch of the first process, which the others take over: draws of a collator differ.

        Args:
            inputs: The batch of this process, with ``input_ids``.
            window: Least length of a shard; rows are padded to it.
            pad: Token of padding.

        Raises:
            ValueError: The batch has no ``input_ids``, or something else than tensors.
        """
        others = sorted(name for name, x in inputs.items() if not isinstance(x, Tensor))
        if others or "input_ids" not in inputs:
            raise ValueError(
                f"data must give batches of tensors with input_ids, got {sorted(inputs)}: rows of "
                "other inputs cannot be cut; pass sequence_parallel=1"
            )
        first: list[Any] = [{name: x.cpu() for name, x in inputs.items()}]
        dist.broadcast_object_list(first, group_src=0, group=self.group)
        return with_least_length(first[0], self.size * max(1, window), pad=pad)

    def shard(
        self, batch: Mapping[str, Tensor], *, is_causal: bool, counts_padding: bool = False
    ) -> dict[str, Tensor]:
        """This process's shard of a batch, with the positions that the model counts in whole rows.

        Args:
            batch: The whole batch.
            is_causal: Whether labels are the next token's.
            counts_padding: Padding before the tokens of a row has positions too.
        """
        whole, mask = dict(batch), batch.get("attention_mask")
        if counts_padding and mask is not None and "position_ids" not in whole:
            places = torch.arange(mask.shape[1], device=mask.device)
            # Not beyond the last token: rows are padded at the end, where tables of positions stop.
            last = (places * (mask != 0)).amax(1, keepdim=True)
            whole["position_ids"] = places.minimum(last)
        return shard(whole, self.group, is_causal=is_causal)

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """This process's shard of a tensor of whole rows, whose positions are along an axis."""
        if self.group is None:
            return x
        return x.tensor_split(self.size, dim=axis)[dist.get_rank(self.group)].contiguous()

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, without gradient."""
        x = x.detach().clone()
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def joined(self, x: Tensor) -> Tensor:
        """The sum over the processes, with the gradients of all."""
        return x if self.group is None else summed(x, self.group)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Part of this process in the mean over the labels of a row."""
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return losses / self.total((labels != -100).sum()).clamp_min(1)


def relative_error(
    output: Tensor, target: Tensor, mask: Tensor | None = None, row: Row | None = None
) -> Tensor:
    """``|output - target|^2 / |target|^2`` of ``(B, ..., L, D)`` over the tokens of a mask.

    A mask ``(B, L)`` of another length than the outputs is ignored. Of a row that processes share
    it is the part of this one; the parts add up.
    """
    difference = (output.float() - target.float()).square().sum(-1)
    norm = target.float().square().sum(-1)
    if mask is not None and mask.shape[1] == norm.shape[-1]:
        weight = mask.to(norm.dtype).view(mask.shape[0], *(1,) * (norm.ndim - 2), mask.shape[1])
        difference, norm = difference * weight, norm * weight
    whole = (row or Row()).total(norm.sum())
    return difference.sum() / whole.clamp_min(torch.finfo(norm.dtype).tiny)


def mean_state(states: Tensor, mask: Tensor | None, row: Row) -> Tensor:
    """Mean over the tokens of a row that are not padding, ``(B, 1, D)``."""
    if mask is None or mask.shape[1] != states.shape[1]:
        mask = states.new_ones(states.shape[:2])
    weight = mask.to(torch.float32).unsqueeze(-1)
    total = row.joined((states.float() * weight).sum(1, keepdim=True))
    return total / row.total(weight.sum(1, keepdim=True))


def divergence(logits: Tensor, targets: Tensor, mask: Tensor | None, row: Row) -> Tensor:
    """``KL(teacher || student)``, mean over tokens; of a shared row, the part of this process."""
    own, theirs = (F.log_softmax(x.float(), dim=-1) for x in (logits, targets))
    each = F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1)
    weight = torch.ones_like(each)
    if mask is not None and mask.shape == each.shape:
        weight = mask.to(each.dtype)
    return (each * weight).sum() / row.total(weight.sum()).clamp_min(1)
