"""Training objectives as data collators: masked residues (BERT's rule) and next residues.

A collator is called with examples, mappings that hold ``input_ids`` and, as `TokenDataset` gives
them, ``index``, ``epoch`` and, for packed rows, ``sequence_ids``; as `FamilyRows` gives them,
``position_ids`` and ``may_be_target``, the tokens among which targets are. It returns int64 tensors
of shape (batch, length), padded on the right to the longest example:

- ``input_ids``, padding = the tokenizer's pad token;
- ``attention_mask``, 1 at tokens, 0 at padding;
- ``labels``, -100 where there is no target;
- ``sequence_ids``, if the examples have them, -1 at padding;
- ``position_ids``, if the examples have them, 0 at padding.

Collators hold no state. What is random in an example is a pure function of (seed, epoch, index),
all read from the example and the constructor: it does not depend on the batch, on the number of
workers and processes, or on whether the run was resumed. Trainer resumes by skipping batches of the
sampler, and `LengthBucketedBatchSampler` puts the epoch into what it yields, so a resumed run sees
the same masks. Data read in plain order (an evaluation) is at epoch 0 throughout, which fixes its
masks from the seed alone.

With transformers' Trainer set ``remove_unused_columns=False``; otherwise it removes ``index`` and
``epoch`` before they get here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from performers.proteins.inputs.tokenizer import AMINO_ACIDS, residue_ids

_Row = npt.NDArray[np.int64]

IGNORE_INDEX = -100
"""The label of a position without a target, as in `torch.nn.functional.cross_entropy`."""

BERT_RULE = (0.8, 0.1)
"""Shares of the targets replaced by the mask token, and by a random residue; the rest is kept."""

ALL_HIDDEN = (1.0, 0.0)
"""Every target is replaced by the mask token: for evaluation, where a kept one is a free hit."""


class _Collator:
    """Batches of examples, padded on the right; `_row` makes inputs and labels of one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: has no pad token; use one from build_protein_tokenizer()")
        self._pad_id = int(tokenizer.pad_token_id)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of the tensors that the module describes.

        Raises:
            ValueError: An example to be masked lacks ``index``.
            KeyError: An example lacks ``input_ids``, or ids that another one has.
        """
        inputs, labels = zip(*map(self._row, examples), strict=True)
        batch = {
            "input_ids": _stack(inputs, self._pad_id),
            "attention_mask": _stack([np.ones_like(row) for row in inputs], 0),
            "labels": _stack(labels, IGNORE_INDEX),
        }
        for name, fill in (("sequence_ids", -1), ("position_ids", 0)):
            if any(name in example for example in examples):
                batch[name] = _stack([example[name] for example in examples], fill)
        return batch

    def _row(self, example: Mapping[str, Any]) -> tuple[_Row, _Row]:
        raise NotImplementedError


class MaskedCollator(_Collator):
    """Masked language modelling on residues (Devlin et al. 2019, section 3.1).

    In an example with n residues, max(1, round(mask_probability * n)) residues chosen uniformly are
    targets. By BERT's rule a target is replaced by the mask token with probability 0.8, by a
    uniformly drawn standard amino acid with probability 0.1, and kept otherwise. Special tokens are
    never targets.

    Args:
        tokenizer: A protein tokenizer with pad and mask tokens.
        mask_probability: Share of the residues that are targets, in (0, 1].
        seed: Seed of all masks, at least 0.
        replaced: Shares of the targets replaced by the mask token and by a random amino acid:
            ``BERT_RULE`` to train, ``ALL_HIDDEN`` to evaluate. It does not change which residues
            are targets.

    Raises:
        ValueError: An argument is out of range, or the tokenizer lacks a token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask_probability: float = 0.15,
        seed: int = 0,
        replaced: tuple[float, float] = BERT_RULE,
    ) -> None:
        super().__init__(tokenizer)
        if not 0 < mask_probability <= 1:
            raise ValueError(
                f"mask_probability: expected a number above 0 and at most 1, got {mask_probability}"
            )
        if seed < 0:
            raise ValueError(f"seed: expected an integer of at least 0, got {seed}")
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: has no mask token; use one from build_protein_tokenizer()")
        self.mask_probability, self.seed, self.replaced = mask_probability, seed, replaced
        self._mask_id = int(tokenizer.mask_token_id)
        self._residues = residue_ids(tokenizer)
        self._replacements = residue_ids(tokenizer, AMINO_ACIDS)

    def _row(self, example: Mapping[str, Any]) -> tuple[_Row, _Row]:
        tokens = np.asarray(example["input_ids"]).astype(np.int64)
        if "index" not in example:
            raise ValueError(
                "examples: expected an 'index' in each, which with the seed decides its mask; use "
                "a TokenDataset, and remove_unused_columns=False with Trainer"
            )
        labels = np.full_like(tokens, IGNORE_INDEX)
        candidates = np.isin(tokens, self._residues)
        if "may_be_target" in example:
            candidates &= example["may_be_target"]
        residues = np.flatnonzero(candidates)
        if not residues.size:
            return tokens, labels
        key = (self.seed, int(example.get("epoch", 0)), int(example["index"]))
        random = np.random.default_rng(key)
        count = max(1, int(self.mask_probability * residues.size + 0.5))
        targets = random.permutation(residues)[:count]
        labels[targets] = tokens[targets]
        fate = random.random(count)
        replacements = random.choice(self._replacements, count)
        by_mask = fate < self.replaced[0]
        at_random = ~by_mask & (fate < sum(self.replaced))
        tokens[targets[by_mask]] = self._mask_id
        tokens[targets[at_random]] = replacements[at_random]
        return tokens, labels


class CausalCollator(_Collator):
    """Next-token prediction: the labels are the inputs; transformers' causal models shift inside.

    In a packed row the first token of each sequence but the row's first has no target either: it
    would be predicted from another sequence. The tokenizer needs a pad token.
    """

    def _row(self, example: Mapping[str, Any]) -> tuple[_Row, _Row]:
        tokens = np.asarray(example["input_ids"]).astype(np.int64)
        labels = tokens.copy()
        if "sequence_ids" in example:
            starts = np.flatnonzero(np.diff(np.asarray(example["sequence_ids"]))) + 1
            labels[starts] = IGNORE_INDEX
        if "may_be_target" in example:
            labels[~np.asarray(example["may_be_target"])] = IGNORE_INDEX
        return tokens, labels


def _stack(rows: Sequence[npt.ArrayLike], fill: int) -> Tensor:
    tensors = [torch.from_numpy(np.asarray(row, dtype=np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)
