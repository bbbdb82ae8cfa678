"""Batches for distillation: padded, and with tokens hidden for masked language models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

__all__ = ["Collator", "Stream"]

_IGNORED = -100


@dataclass
class Collator:
    """Examples of different lengths as one batch.

    Attributes:
        pad_token_id: Fills ``input_ids`` up.
        mask_token_id: Stands for hidden tokens; None: nothing is hidden.
        special_token_ids: Never hidden.
        mask_probability: Share of the other tokens that is hidden. The batch then has ``labels``
            for these.
        causal_labels: The batch has ``labels`` equal to its tokens, as causal models take them.
    """

    pad_token_id: int = 0
    mask_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()
    mask_probability: float = 0.15
    causal_labels: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate.

        Args:
            examples: Mappings with ``input_ids`` and perhaps ``attention_mask``, of one dimension;
                or with other tensors (such as ``pixel_values``), which are stacked.

        Returns:
            Tensors with a batch dimension in front.
        """
        if "input_ids" not in examples[0]:
            return {
                name: torch.stack([torch.as_tensor(example[name]) for example in examples])
                for name in examples[0]
            }
        rows = [torch.as_tensor(example["input_ids"]).long().view(-1) for example in examples]
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
            taking = example.get("attention_mask")
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1 if taking is None else torch.as_tensor(taking).view(-1)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.causal_labels:
            batch["labels"] = ids.masked_fill(mask == 0, _IGNORED)
        if self.mask_token_id is not None:
            self._hide(batch)
        return batch

    def _hide(self, batch: dict[str, Tensor]) -> None:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        ordinary = (mask != 0) & ~torch.isin(ids, torch.tensor(self.special_token_ids))
        hidden = ordinary & (torch.rand(ids.shape) < self.mask_probability)
        batch["labels"] = ids.masked_fill(~hidden, _IGNORED)
        assert self.mask_token_id is not None
        batch["input_ids"] = ids.masked_fill(hidden, self.mask_token_id)


class Stream(IterableDataset[Any]):
    """An iterable of examples, begun again when it ends."""

    def __init__(self, examples: Iterable[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        """Without end, if the examples can be had again."""
        while True:
            empty = True
            for example in self.examples:
                empty = False
                yield example
            if empty:
                return
