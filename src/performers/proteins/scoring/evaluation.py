"""Accuracy, perplexity and loss of a model on sequences, beside the best constant prediction.

A target counts if its label is a residue (one of the 20 amino acids or ``XBZUOJ``). Positions
labelled -100 and special tokens do not: predicting ``<eos>`` or a pad token well says nothing about
proteins. The prediction is the model's distribution over its whole vocabulary; nothing is
renormalised to residues.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.progress import Progress
from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.objectives import ALL_HIDDEN, CausalCollator, MaskedCollator
from performers.proteins.inputs.packing import TokenDataset
from performers.proteins.inputs.relatives import RelativesRows
from performers.proteins.inputs.tokenizer import encode_sequences, residue_ids
from performers.proteins.scoring.batches import run_batches


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    relatives: RelativesRows | None = None,
    max_length: int = 1024,
    by_sequence: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score predictions per residue, beside the best constant prediction on the same residues.

    A causal model predicts every residue from those before it. A masked model predicts a share of
    the residues, all of them hidden behind the mask token: BERT's training rule leaves a tenth of
    them visible, and copying those would pass for an accuracy of its own. Which ones is a function
    of ``seed`` and the sequence's place in the list, so the same call gives the same number.

    Sequences of more than ``max_length`` tokens are split into windows; with ``relatives``, rows in
    which they are read after relatives, they are not, and the same residues of theirs are scored
    as without. The other options are those of `evaluate_rows`.

    Returns:
        ``accuracy``, ``perplexity``, ``loss`` (nats per residue), ``tokens`` (residues scored),
        ``baseline_accuracy``, ``baseline_perplexity``, ``sequences``; with ``by_sequence`` also
        lists ``correct_by_sequence`` and ``tokens_by_sequence``, in the order of the sequences.

    Raises:
        ValueError: There is no sequence, or an option is out of range.
        UserError: Learned positions end before ``max_length`` does.
    """
    dataset: TokenDataset | RelativesRows
    if relatives is None:
        dataset = TokenDataset(encode_sequences(tokenizer, sequences), max_length=max_length)
        sequence_of_row = dataset.sequence_of_row
    else:
        dataset, sequence_of_row = relatives, np.arange(len(sequences))
    metrics = evaluate_rows(
        model,
        tokenizer,
        dataset,
        sequence_of_row=sequence_of_row if by_sequence else None,
        **options,
    )
    return {**metrics, "sequences": len(sequences)}


def evaluate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenDataset | FamilyRows | RelativesRows,
    *,
    batch_tokens: int = 8192,
    mask_probability: float = 0.15,
    seed: int = 0,
    across_sequences: bool = False,
    sequence_of_row: npt.NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As ``evaluate_model``, without its ``sequences``, on rows that are cut already.

    Rows may be packed, or of proteins after their relatives; a longer row than ``batch_tokens`` is
    a batch of its own. ``across_sequences`` lets attention cross the boundaries of packed
    sequences; ``sequence_of_row`` counts sequences apart, by the number of each row's;
    ``progress`` is called with the rows done and the rows in all, after each batch.
    """
    is_causal = bool(model.config.is_decoder)
    collator: MaskedCollator | CausalCollator = CausalCollator(tokenizer)
    if not is_causal:
        collator = MaskedCollator(
            tokenizer, mask_probability=mask_probability, seed=seed, replaced=ALL_HIDDEN
        )

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collator(rows)
        if across_sequences:
            batch.pop("sequence_ids", None)
        return batch

    count = 0 if sequence_of_row is None else int(sequence_of_row.max()) + 1
    metrics = ResidueMetrics(tokenizer, is_causal=is_causal, sequences=count)
    for places, batch, output in run_batches(
        model, dataset, collate, batch_tokens=batch_tokens, progress=progress
    ):
        numbers = None if sequence_of_row is None else sequence_of_row[places]
        metrics.update(output.logits, batch["labels"], numbers)
    found = metrics.compute()
    if sequence_of_row is not None:
        found["correct_by_sequence"] = metrics.correct_of.tolist()
        found["tokens_by_sequence"] = metrics.tokens_of.tolist()
    return found


class ResidueMetrics:
    """Sum loss and accuracy over batches, in float64.

    Args:
        tokenizer: The protein tokenizer, which tells residues from other tokens.
        is_causal: Whether ``logits[t]`` predicts ``labels[t + 1]``, as in causal models of
            transformers, rather than ``labels[t]``.
        sequences: Number of sequences to count apart.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        is_causal: bool = False,
        sequences: int = 0,
    ) -> None:
        self.is_causal = is_causal
        self.correct_of: npt.NDArray[np.int64] = np.zeros(sequences, dtype=np.int64)
        """Correct predictions of each sequence."""
        self.tokens_of: npt.NDArray[np.int64] = np.zeros(sequences, dtype=np.int64)
        """Targets of each sequence."""
        self.loss_sum = 0.0
        self.correct = 0
        self.target_counts: npt.NDArray[np.int64] = np.zeros(len(tokenizer), dtype=np.int64)
        """Number of times that each token id was a target, (vocabulary,)."""
        self._residues = torch.from_numpy(residue_ids(tokenizer))

    @property
    def count(self) -> int:
        """Number of residues that were targets."""
        return int(self.target_counts.sum())

    @torch.no_grad()
    def update(
        self, logits: Tensor, labels: Tensor, sequences: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Add a batch.

        Args:
            logits: Unnormalised log-probabilities, (..., length, vocabulary), any float dtype. The
                vocabulary may be larger than the tokenizer's.
            labels: Target ids, (..., length), -100 where there is none; not shifted.
            sequences: Number of the sequence of each row, (batch,), for labels (batch, length).
        """
        if self.is_causal:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        keep = torch.isin(labels, self._residues.to(labels.device))
        targets = labels[keep].cpu()
        # Only the kept positions move; not every device has float64.
        scores = logits[keep].cpu().double()
        log_probabilities = scores.log_softmax(-1).gather(-1, targets[:, None])
        self.loss_sum -= float(log_probabilities.sum())
        hits = scores.argmax(-1) == targets
        self.correct += int(hits.sum())
        self.target_counts += np.bincount(targets.numpy(), minlength=self.target_counts.size)
        if sequences is not None:
            rows = sequences[keep.nonzero()[:, 0].cpu().numpy()]
            np.add.at(self.tokens_of, rows, 1)
            np.add.at(self.correct_of, rows, hits.numpy())

    def compute(self) -> dict[str, Any]:
        """Compute the metrics over all targets so far.

        With the empirical distribution p of the targets, the best constant top-1 prediction is
        right with frequency max p, and the best constant distribution, p itself, has perplexity
        exp(-sum p log p).

        Returns:
            ``accuracy`` (a share of 1), ``perplexity`` = exp(loss), ``loss`` (mean negative
            log-likelihood of a residue, nats), ``tokens`` (residues counted), and
            ``baseline_accuracy`` and ``baseline_perplexity`` on the very same residues.

        Raises:
            ValueError: No residue was a target so far.
        """
        tokens = self.count
        if not tokens:
            raise ValueError("no residue was a target; update with labels that have residues")
        loss = self.loss_sum / tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        shares = self.target_counts[self.target_counts > 0] / tokens
        return {
            "accuracy": self.correct / tokens,
            "perplexity": perplexity,
            "loss": loss,
            "tokens": tokens,
            "baseline_accuracy": float(shares.max()),
            "baseline_perplexity": math.exp(-float((shares * np.log(shares)).sum())),
        }
