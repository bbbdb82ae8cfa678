"""Accuracy, perplexity and loss per residue, beside the best constant prediction.

A target counts if its label is a residue (one of the 20 amino acids or ``XBZUOJ``). Positions
labelled -100 and special tokens do not: predicting ``<eos>`` or a pad token well says nothing about
proteins. The prediction is the model's distribution over its whole vocabulary; nothing is
renormalised to residues.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from performers.proteins.inputs.tokenizer import residue_ids


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
        """How often each token id was a target, (vocabulary,)."""
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
