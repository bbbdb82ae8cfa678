"""Batches for distillation: padded, and with masked tokens for masked language models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

_IGNORED = -100


@dataclass
class Collator:
    """Examples of different lengths as one batch.

    With ``mask_token_id``, tokens other than the special ones are masked with ``mask_probability``
    and become the ``labels``. With ``causal_labels`` these are the tokens themselves.
    """

    pad_token_id: int = 0
    mask_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()
    mask_probability: float = 0.15
    causal_labels: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate mappings with ``input_ids`` and perhaps ``attention_mask``, of one dimension.

        Mappings of other tensors (such as ``pixel_values``) are stacked.
        """
        if "input_ids" not in examples[0]:
            return {
                name: torch.stack([torch.as_tensor(example[name]) for example in examples])
                for name in examples[0]
            }
        rows = [torch.as_tensor(example["input_ids"]).long().view(-1) for example in examples]
        masks = [
            torch.ones_like(row) if mask is None else torch.as_tensor(mask).long().view(-1)
            for row, mask in zip(rows, (x.get("attention_mask") for x in examples), strict=True)
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        mask = pad_sequence(masks, batch_first=True)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.causal_labels:
            batch["labels"] = ids.masked_fill(mask == 0, _IGNORED)
        if self.mask_token_id is not None:
            ordinary = (mask != 0) & ~torch.isin(ids, torch.tensor(self.special_token_ids))
            masked = ordinary & (torch.rand(ids.shape) < self.mask_probability)
            batch["labels"] = ids.masked_fill(~masked, _IGNORED)
            batch["input_ids"] = ids.masked_fill(masked, self.mask_token_id)
        return batch


class Stream(IterableDataset[Any]):
    """An iterable of examples, repeated without end if it can be iterated again."""

    def __init__(self, examples: Iterable[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the examples, pass after pass, until a pass is empty."""
        ended = False
        while not ended:
            ended = True
            for example in self.examples:
                ended = False
                yield example
