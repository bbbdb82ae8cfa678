"""The part of a batch that one rank computes, and the tokens of all."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from performers.distributed.messages import gather

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
        ValueError: The batch has neither ``input_ids`` nor ``inputs_embeds``, a tensor is not as
            long, or there are fewer positions than processes; the same on all ranks.
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
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rows[1] < size:
        raise ValueError(
            f"batch must have a position for each of {size} processes, got rows of {rows[1]}: pad "
            "them, or use fewer processes"
        )
    whole = dict(batch)
    if "position_ids" not in whole:
        mask = whole.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, dtype=torch.int64, device=inputs.device)
        counts = mask.long().cumsum(1)
        if cu_seqlens is not None:
            starts = torch.as_tensor(cu_seqlens, device=inputs.device)[:-1].long()
            # None begins after the end, where empty sequences may be.
            starts = starts[starts < counts.shape[1]]
            first = torch.zeros_like(counts).index_fill_(1, starts, 1).cumsum(1) - 1
            before = F.pad(counts, (1, 0)).gather(1, starts[first])
            counts = counts - before
        whole["position_ids"] = (counts - 1).clamp_min(0)
    if is_causal and "labels" in whole and "shift_labels" not in whole:
        whole["labels"] = F.pad(whole["labels"][:, 1:], (0, 1), value=_IGNORED)
        whole["shift_labels"] = whole["labels"]
    # Copies, since a view would keep the whole row.
    return {name: x.tensor_split(size, dim=1)[rank].clone() for name, x in whole.items()}


def one_row(batch: Mapping[str, Tensor], *, is_causal: bool) -> tuple[dict[str, Tensor], list[int]]:
    """Rows of packed sequences as one row, and the boundaries of its sequences.

    The tensors have shape ``(B, L)``; ``sequence_ids``, with -1 at padding, are among them.
    """
    ids = batch["sequence_ids"]
    rows = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
    # An id of one row is no sequence of the next.
    ids = ids + rows * (ids.max() + 2)
    whole = {name: x.flatten().unsqueeze(0) for name, x in {**batch, "sequence_ids": ids}.items()}
    if is_causal and "labels" in batch:
        # The first token of a row follows from none.
        whole["labels"] = F.pad(batch["labels"][:, 1:], (1, 0), value=_IGNORED).flatten()[None]
    changes = whole["sequence_ids"][0].diff().nonzero().squeeze(1) + 1
    return whole, [0, *changes.tolist(), ids.numel()]


def with_least_length(batch: Mapping[str, Tensor], length: int, *, pad: int) -> dict[str, Tensor]:
    """A batch of tensors ``(B, L)``, padded at the end to ``length`` where that is longer.

    Raises:
        ValueError: The batch has a tensor whose padding is not known.
    """
    missing = length - batch["input_ids"].shape[1]
    if missing <= 0:
        return dict(batch)
    whole = dict(batch)
    whole.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    fills = {"input_ids": pad, "labels": _IGNORED, "sequence_ids": -1}
    fills |= {"attention_mask": 0, "position_ids": 0}
    others = sorted(whole.keys() - fills.keys())
    if others:
        raise ValueError(
            f"rows of {length - missing} tokens are too short to be cut, and {', '.join(others)} "
            "cannot be padded: use longer rows, fewer processes or a shorter window"
        )
    return {name: F.pad(x, (0, missing), value=fills[name]) for name, x in whole.items()}


def gather_positions(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole row, ``(B, L, ...)``, of the shards ``(B, L / size, ...)`` that `shard` cut."""
    size = torch.tensor(x.shape[1], device=x.device)
    lengths = gather(size, group).tolist()
    room = x.new_zeros(x.shape[0], max(lengths), *x.shape[2:])
    room[:, : x.shape[1]] = x
    return torch.cat([y[:, :n] for y, n in zip(gather(room, group), lengths, strict=True)], dim=1)


def count_labels(labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Labels other than -100 on all ranks, a 0-dimensional int64 tensor.

    As ``num_items_in_batch`` of a model of transformers it makes the losses of all ranks add up to
    the mean over the row, and the sums of their gradients to its gradient.
    """
    count = (labels != _IGNORED).sum()
    dist.all_reduce(count, group=group)
    return count
