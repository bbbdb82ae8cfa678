"""The part of a batch that one rank computes, and the tokens of all."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

_IGNORED = -100


def shard(
    batch: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    is_causal: bool,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Cut the positions of a batch, and return those of this rank.

    Shards are consecutive and differ by one position at most. ``position_ids`` are those of the
    whole row; where the batch has none they count the tokens of its ``attention_mask``, and begin
    again at each of ``cu_seqlens``. Labels of a causal model are moved to the position that
    predicts them before the row is cut, and named ``shift_labels`` too: models of transformers then
    leave them in place.

    Args:
        batch: The whole batch, the same on all ranks: tensors of shape ``(B, L)`` or
            ``(B, L, ...)``, with ``input_ids`` or ``inputs_embeds`` among them.
        group: The processes of the row; None for all.
        is_causal: Whether labels are the next token's.
        cu_seqlens: Boundaries of packed sequences, as for `sequence_parallel`.

    Raises:
        ValueError: The batch has neither ``input_ids`` nor ``inputs_embeds``, or a tensor is not
            as long.
    """
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if inputs is None:
        raise ValueError(f"batch must have input_ids or inputs_embeds, got {sorted(batch)}")
    rows = tuple(inputs.shape[:2])
    for name, tensor in batch.items():
        if tuple(tensor.shape[:2]) != rows:
            raise ValueError(
                f"{name} must have shape {rows} or {rows} and more dimensions, as the inputs have, "
                f"got {tuple(tensor.shape)}: take it out of the batch, and cut it apart"
            )
    whole = dict(batch)
    if "position_ids" not in whole:
        mask = whole.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, dtype=torch.int64, device=inputs.device)
        counts = mask.long().cumsum(1)
        if cu_seqlens is not None:
            starts = torch.as_tensor(cu_seqlens, device=inputs.device)[:-1].long()
            first = torch.zeros_like(counts).index_fill_(1, starts, 1).cumsum(1) - 1
            before = F.pad(counts, (1, 0)).gather(1, starts[first])
            counts = counts - before
        whole["position_ids"] = (counts - 1).clamp_min(0)
    if is_causal and "labels" in whole and "shift_labels" not in whole:
        whole["labels"] = F.pad(whole["labels"][:, 1:], (0, 1), value=_IGNORED)
        whole["shift_labels"] = whole["labels"]
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return {name: x.tensor_split(size, dim=1)[rank].contiguous() for name, x in whole.items()}


def count_labels(labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Labels other than -100 on all ranks, a 0-dimensional int64 tensor.

    As ``num_items_in_batch`` of a model of transformers it makes the losses of all ranks add up to
    the mean over the row, and the sums of their gradients to its gradient.
    """
    count = (labels != _IGNORED).sum()
    dist.all_reduce(count, group=group)
    return count
