"""Similarity of amino acids, read from the attention or the embeddings of a model.

The procedure is that of Choromanski et al. (2021, App. C.4) after Vig et al. (2020). For every
head h, f_h(a) is the attention paid to amino acid a over all attention between residues, both
summed over sequences. Two amino acids are similar when the heads rise and fall together on them:
S(a, b) is the Pearson correlation of f(a) and f(b) over the heads.

A common amino acid takes a large share in every head, yet this does not enter S: Pearson ignores
the scale of either vector, so shares divided by the frequency of the amino acid give the same S.
What does enter is that shares add up to one: where a common amino acid gains, others must lose,
which lowers correlations between common amino acids. S is reported as the paper defines it.

The other similarity needs no sequences: cosines between the model's input embeddings of the amino
acids, their mean taken off (`embedding_similarity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.proteins.inputs.tokenizer import AMINO_ACIDS, residue_ids
from performers.proteins.reading.head_scores import (
    check_attention,
    residue_mask,
)

__all__ = [
    "EXPECTED_PAIRS",
    "AminoAcidPair",
    "AttentionSimilarity",
    "RankedPair",
    "embedding_similarity",
    "pair_ranks",
    "top_pairs",
]

_MIN_HEADS = 3
# Shares that differ by less than float32 rounding carry no information about the heads.
_CONSTANT = 1e-6


EXPECTED_PAIRS = ("DE", "FY", "IV", "KR")
"""Amino acids that exchange readily: acidic, aromatic, branched aliphatic, basic."""


class AminoAcidPair(NamedTuple):
    """Two amino acids and the similarity of the attention that they receive."""

    first: str
    second: str
    similarity: float


class RankedPair(NamedTuple):
    """A pair and its place among all pairs that have a similarity.

    Attributes:
        first: An amino acid.
        second: Another one.
        similarity: Of the two; NaN where undefined.
        rank: 1 for the most similar pair of all; None where undefined.
        of: Number of pairs that have a similarity; 190 when all twenty amino acids do.
    """

    first: str
    second: str
    similarity: float
    rank: int | None
    of: int


class AttentionSimilarity:
    """Accumulate attention by amino acid over batches; see the module for the definition.

    Two sums are kept side by side: of all attention, and of attention above `threshold` only
    (Vig et al. drop what is at most 0.1, which may erase diffuse attention). Special tokens and
    padding are dropped as queries and as keys. The letters X, B, Z, U, O and J are residues: they
    count in the denominator, but are not among the twenty.

    Args:
        tokenizer: A transformers tokenizer with one token per amino acid.
        threshold: Attention at or below this is dropped from the thresholded sums.

    Raises:
        ValueError: `threshold` is outside [0, 1) or the tokenizer lacks an amino acid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, threshold: float = 0.1) -> None:
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold must be at least 0 and below 1, got {threshold}")
        self.threshold = threshold
        self.sequences = 0
        self.occurrences: NDArray[np.int64] = np.zeros(len(AMINO_ACIDS), dtype=np.int64)
        self._ids = torch.from_numpy(residue_ids(tokenizer, AMINO_ACIDS))
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._heads: list[str] = []
        self._paid: dict[bool, NDArray[np.float64]] = {}
        self._total: dict[bool, NDArray[np.float64]] = {}

    def update(
        self, input_ids: Tensor, attention_mask: Tensor, attentions: Sequence[Tensor]
    ) -> None:
        """Add one batch.

        Args:
            input_ids: Token ids (B, L).
            attention_mask: (B, L), non-zero where a token takes part.
            attentions: One tensor (B, H, L, L) per layer, rows being queries; the number of
                layers and heads must be the same in every batch.

        Raises:
            ValueError: A shape does not fit the tokens or the batches before.
        """
        if len(attentions) == 0:
            raise ValueError("attentions must hold a tensor per layer, got none")
        for layer, weights in enumerate(attentions, start=1):
            check_attention(weights, input_ids.shape, layer)
        heads = [
            f"{layer}.{head + 1}"
            for layer, weights in enumerate(attentions, start=1)
            for head in range(weights.shape[1])
        ]
        if self._heads and heads != self._heads:
            raise ValueError(
                f"attentions must have the same heads in every batch: {len(self._heads)} before, "
                f"{len(heads)} now"
            )
        residues = residue_mask(input_ids, attention_mask, self._special_ids)
        letters = (input_ids.cpu()[..., None] == self._ids) & residues.cpu()[..., None]
        if not self._heads:
            self._heads = heads
            for thresholded in (False, True):
                self._paid[thresholded] = np.zeros((len(heads), len(AMINO_ACIDS)))
                self._total[thresholded] = np.zeros(len(heads))
        self.sequences += int(residues.any(dim=1).sum())
        self.occurrences += letters.sum((0, 1)).numpy()
        for thresholded in (False, True):
            parts = [self._sum_layer(w, residues, letters, thresholded) for w in attentions]
            self._paid[thresholded] += np.concatenate([paid for paid, _ in parts])
            self._total[thresholded] += np.concatenate([total for _, total in parts])

    def _sum_layer(
        self, weights: Tensor, residues: Tensor, letters: Tensor, thresholded: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Attention paid to each amino acid (H, 20) and to all residues (H,) in one layer."""
        weights = weights.detach()
        if weights.dtype in (torch.float16, torch.bfloat16):
            weights = weights.float()
        dropped = ~(residues[:, :, None] & residues[:, None, :]).to(weights.device)[:, None]
        if thresholded:
            dropped = dropped | (weights <= self.threshold)
        received = weights.masked_fill(dropped, 0.0).sum(2).cpu().double()
        paid = torch.einsum("bhl,bla->ha", received, letters.double())
        return paid.numpy(), received.sum((0, 2)).numpy()

    def shares(self, *, thresholded: bool = False) -> NDArray[np.float64]:
        """f_h(a), the share of the attention between residues that amino acid a receives.

        Args:
            thresholded: Whether to count only attention above the threshold.

        Returns:
            (heads, 20), heads in layer order. NaN in the row of a head with no such attention,
            and in the column of an amino acid that never occurs.
        """
        if not self._heads:
            return np.full((0, len(AMINO_ACIDS)), np.nan)
        total = self._total[thresholded].copy()
        total[~np.isfinite(total) | (total <= 0)] = np.nan
        shares = self._paid[thresholded] / total[:, None]
        shares[:, self.occurrences == 0] = np.nan
        return shares

    def similarity(self, *, thresholded: bool = False) -> NDArray[np.float64]:
        """S(a, b), the Pearson correlation over the heads of the shares of a and b.

        Args:
            thresholded: Whether to count only attention above the threshold.

        Returns:
            Symmetric (20, 20) in the order of `AMINO_ACIDS`. A row and column are NaN where the
            correlation is undefined; `notes` says why.
        """
        matrix = np.full((len(AMINO_ACIDS), len(AMINO_ACIDS)), np.nan)
        shares = self.shares(thresholded=thresholded)
        shares = shares[_usable_heads(shares)]
        if len(shares) < _MIN_HEADS:
            return matrix
        varies = _varies(shares)
        centred = shares[:, varies] - shares[:, varies].mean(0)
        unit = centred / np.linalg.norm(centred, axis=0)
        correlation = np.clip(unit.T @ unit, -1.0, 1.0)
        np.fill_diagonal(correlation, 1.0)
        matrix[np.ix_(varies, varies)] = correlation
        return matrix

    def heads(self, *, thresholded: bool = False) -> int:
        """Number of heads that the correlation runs over."""
        return int(_usable_heads(self.shares(thresholded=thresholded)).sum())

    def notes(self, *, thresholded: bool = False) -> list[str]:
        """Sentences on what was left out and why; empty when nothing was."""
        if not self._heads:
            return ["No attention was recorded, so there is no similarity."]
        notes = []
        absent = [a for a, seen in zip(AMINO_ACIDS, self.occurrences, strict=True) if seen == 0]
        if absent:
            notes.append(
                f"Never seen in the sequences, so without a similarity: {', '.join(absent)}."
            )
        shares = self.shares(thresholded=thresholded)
        usable = _usable_heads(shares)
        if not usable.all():
            idle = [head for head, used in zip(self._heads, usable, strict=True) if not used]
            kind = f"attention above {self.threshold:g}" if thresholded else "finite attention"
            shown = ", ".join(idle[:12]) + (" and others" if len(idle) > 12 else "")
            notes.append(
                f"{len(idle)} of {len(usable)} heads have no {kind} between residues and were "
                f"left out: {shown}."
            )
        if usable.sum() < _MIN_HEADS:
            notes.append(
                f"Heads left to correlate over: {usable.sum()}; a correlation needs at least "
                f"{_MIN_HEADS}, so there is no similarity."
            )
            return notes
        still = (self.occurrences > 0) & ~_varies(shares[usable])
        if still.any():
            letters = ", ".join(a for a, flat in zip(AMINO_ACIDS, still, strict=True) if flat)
            notes.append(
                "Given the same share of attention by every head, so without a similarity: "
                f"{letters}."
            )
        return notes


def embedding_similarity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> NDArray[np.float64]:
    """Cosines between the input embeddings of the amino acids, their mean over the twenty off.

    S(a, b) = (e_a - m)·(e_b - m) / (|e_a - m| |e_b - m|). Without the mean, what all amino acids
    share against special tokens would make all of them alike.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer, one token per amino acid.

    Returns:
        Symmetric (20, 20) in the order of `AMINO_ACIDS`; NaN for one that lies at the mean.

    Raises:
        ValueError: The tokenizer lacks an amino acid.
    """
    table = model.get_input_embeddings().weight.detach().cpu().double().numpy()
    vectors = table[residue_ids(tokenizer, AMINO_ACIDS)]
    centred = vectors - vectors.mean(0)
    norms = np.linalg.norm(centred, axis=1)
    norms[norms <= _CONSTANT * np.linalg.norm(vectors, axis=1)] = np.nan
    unit = centred / norms[:, None]
    similarity: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(similarity, np.where(np.isnan(norms), np.nan, 1.0))
    return similarity


def top_pairs(similarity: NDArray[np.float64], count: int = 10) -> list[AminoAcidPair]:
    """The pairs of different amino acids with the highest similarity, highest first.

    Args:
        similarity: (20, 20) in the order of `AMINO_ACIDS`.
        count: How many at most.
    """
    rows, columns = np.triu_indices(len(AMINO_ACIDS), k=1)
    values = similarity[rows, columns]
    order = [i for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
    return [
        AminoAcidPair(AMINO_ACIDS[rows[i]], AMINO_ACIDS[columns[i]], float(values[i]))
        for i in order[:count]
    ]


def pair_ranks(
    similarity: NDArray[np.float64], pairs: Sequence[str] = EXPECTED_PAIRS
) -> list[RankedPair]:
    """The places of given pairs of amino acids among all pairs, most similar first.

    Args:
        similarity: (20, 20) in the order of `AMINO_ACIDS`.
        pairs: Two letters each.

    Returns:
        A rank for each pair, in the order given.
    """
    values = similarity[np.triu_indices(len(AMINO_ACIDS), k=1)]
    values = values[np.isfinite(values)]
    ranked = []
    for pair in pairs:
        first, second = pair[0], pair[1]
        value = float(similarity[AMINO_ACIDS.index(first), AMINO_ACIDS.index(second)])
        rank = 1 + int((values > value).sum()) if np.isfinite(value) else None
        ranked.append(RankedPair(first, second, value, rank, len(values)))
    return ranked


def _usable_heads(shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(shares).any(axis=1))


def _varies(shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the amino acids whose shares (heads, 20) differ by more than rounding."""
    spread = shares.std(0)
    # NaN (an amino acid never seen) compares as False, which is what is wanted.
    return np.asarray(spread > _CONSTANT * np.abs(shares.mean(0)))
