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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.proteins.inputs.tokenizer import AMINO_ACIDS, residue_ids

EXPECTED_PAIRS = ("DE", "FY", "IV", "KR")
"""Amino acids that exchange readily: acidic, aromatic, branched aliphatic, basic."""

_MIN_HEADS = 3
# Shares that differ by less than float32 rounding carry no information about the heads.
_CONSTANT = 1e-6


class AttentionSimilarity:
    """Accumulate attention by amino acid over batches; see the module for the definition.

    Special tokens and padding are dropped as queries and as keys. The letters X, B, Z, U, O and J
    are residues: they count in the denominator, but are not among the twenty.

    Args:
        tokenizer: A transformers tokenizer with one token per amino acid.
        threshold: Attention at or below this is dropped, as Vig et al. drop what is at most 0.1,
            which may erase diffuse attention; None drops nothing.

    Raises:
        ValueError: The tokenizer lacks an amino acid.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, threshold: float | None = None
    ) -> None:
        self.threshold = threshold
        self.occurrences: NDArray[np.int64] = np.zeros(len(AMINO_ACIDS), dtype=np.int64)
        self._ids = torch.from_numpy(residue_ids(tokenizer, AMINO_ACIDS))
        self._residues = torch.from_numpy(residue_ids(tokenizer))
        self._names: list[str] = []
        # A row for each head once there is a batch.
        self._paid = np.zeros((1, len(AMINO_ACIDS)))
        self._total = np.zeros(1)

    def update(self, input_ids: Tensor, attentions: Sequence[Tensor]) -> None:
        """Add one batch: token ids (B, L), and attention (B, H, L, L) per layer, rows queries."""
        residues = torch.isin(input_ids, self._residues)
        letters = (input_ids[..., None] == self._ids).double()
        outside = ~(residues[:, :, None] & residues[:, None, :])[:, None]
        paid, total = [], []
        for weights in attentions:
            # Sums of 16-bit numbers would be rounded.
            weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
            dropped = outside.to(weights.device)
            if self.threshold is not None:
                dropped = dropped | (weights <= self.threshold)
            received = weights.masked_fill(dropped, 0.0).sum(2).cpu().double()
            paid.append(torch.einsum("bhl,bla->ha", received, letters))
            total.append(received.sum((0, 2)))
        self._names = [
            f"{layer}.{head}"
            for layer, sums in enumerate(total, start=1)
            for head in range(1, len(sums) + 1)
        ]
        self._paid = torch.cat(paid).numpy() + self._paid
        self._total = torch.cat(total).numpy() + self._total
        self.occurrences += letters.sum((0, 1)).long().numpy()

    def shares(self) -> NDArray[np.float64]:
        """f_h(a), the share of the attention between residues that amino acid a receives.

        Returns:
            (heads, 20), heads in layer order. NaN in the row of a head with no such attention,
            and in the column of an amino acid that never occurs.
        """
        total = np.where(np.isfinite(self._total) & (self._total > 0), self._total, np.nan)
        shares = self._paid / total[:, None]
        shares[:, self.occurrences == 0] = np.nan
        return shares

    def matrix(self) -> NDArray[np.float64]:
        """S(a, b), the Pearson correlation over the heads of the shares of a and b.

        Returns:
            Symmetric (20, 20) in the order of `AMINO_ACIDS`. A row and column are NaN where the
            correlation is undefined; `notes` says why.
        """
        shares = self.shares()
        shares = shares[_usable(shares)]
        if len(shares) < _MIN_HEADS:
            return np.full((len(AMINO_ACIDS), len(AMINO_ACIDS)), np.nan)
        return _cosines((shares - shares.mean(0)).T, _varies(shares))

    def heads(self) -> int:
        """Number of heads that the correlation runs over."""
        return int(_usable(self.shares()).sum())

    def notes(self) -> list[str]:
        """Sentences on what was left out and why; empty when nothing was."""
        notes = []
        if absent := _letters(self.occurrences == 0):
            notes.append(f"Never seen in the sequences, so without a similarity: {absent}.")
        shares = self.shares()
        usable = _usable(shares)
        if not usable.all():
            idle = [name for name, used in zip(self._names, usable, strict=True) if not used]
            above = f"attention above {self.threshold:g}" if self.threshold is not None else ""
            shown = ", ".join(idle[:12]) + (" and others" if len(idle) > 12 else "")
            notes.append(
                f"{len(idle)} of {len(usable)} heads have no {above or 'finite attention'} between "
                f"residues and were left out: {shown}."
            )
        if usable.sum() < _MIN_HEADS:
            notes.append(
                f"Heads left to correlate over: {usable.sum()}; a correlation needs at least "
                f"{_MIN_HEADS}, so there is no similarity."
            )
        elif still := _letters((self.occurrences > 0) & ~_varies(shares[usable])):
            notes.append(
                "Given the same share of attention by every head, so without a similarity: "
                f"{still}."
            )
        return notes


def embedding_similarity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> NDArray[np.float64]:
    """Cosines between the input embeddings of the amino acids, their mean over the twenty off.

    S(a, b) = (e_a - m)·(e_b - m) / (|e_a - m| |e_b - m|). Without the mean, what all amino acids
    share against special tokens would make all of them alike.

    Returns:
        Symmetric (20, 20) in the order of `AMINO_ACIDS`; NaN for one that lies at the mean.

    Raises:
        ValueError: The tokenizer lacks an amino acid.
    """
    table = model.get_input_embeddings().weight.detach().cpu().double().numpy()
    vectors = table[residue_ids(tokenizer, AMINO_ACIDS)]
    centred = vectors - vectors.mean(0)
    apart = np.linalg.norm(centred, axis=1) > _CONSTANT * np.linalg.norm(vectors, axis=1)
    return _cosines(centred, np.asarray(apart))


def top_pairs(similarity: NDArray[np.float64], count: int = 10) -> list[dict[str, Any]]:
    """The pairs of different amino acids with the highest `similarity`, highest first.

    Args:
        similarity: (20, 20) in the order of `AMINO_ACIDS`.
        count: How many at most.
    """
    rows, columns = np.triu_indices(len(AMINO_ACIDS), k=1)
    values = similarity[rows, columns]
    order = [i for i in np.argsort(-values, kind="stable") if np.isfinite(values[i])]
    return [
        {
            "pair": f"{AMINO_ACIDS[rows[i]]}–{AMINO_ACIDS[columns[i]]}",
            "similarity": float(values[i]),
        }
        for i in order[:count]
    ]


def pair_ranks(
    similarity: NDArray[np.float64], pairs: Sequence[str] = EXPECTED_PAIRS
) -> list[dict[str, Any]]:
    """The places of pairs of amino acids among all pairs, most similar first.

    Args:
        similarity: (20, 20) in the order of `AMINO_ACIDS`.
        pairs: Two letters each.

    Returns:
        `pair`, `similarity` (NaN where undefined), `rank` (1 for the most similar pair of all,
        None where undefined) and `of`, the number of pairs that have a similarity.
    """
    values = similarity[np.triu_indices(len(AMINO_ACIDS), k=1)]
    values = values[np.isfinite(values)]
    ranked = []
    for first, second in map(tuple, pairs):
        value = float(similarity[AMINO_ACIDS.index(first), AMINO_ACIDS.index(second)])
        rank = 1 + int((values > value).sum()) if np.isfinite(value) else None
        pair = f"{first}–{second}"
        ranked.append({"pair": pair, "similarity": value, "rank": rank, "of": len(values)})
    return ranked


def _letters(which: NDArray[np.bool_]) -> str:
    return ", ".join(letter for letter, shown in zip(AMINO_ACIDS, which, strict=True) if shown)


def _usable(shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the heads (heads,) that have shares."""
    return np.asarray(np.isfinite(shares).any(axis=1))


def _varies(shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the amino acids whose shares (heads, 20) differ by more than rounding."""
    # NaN (an amino acid never seen) compares as False, which is what is wanted.
    return np.asarray(shares.std(0) > _CONSTANT * np.abs(shares.mean(0)))


def _cosines(vectors: NDArray[np.float64], defined: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Cosines between vectors (n, width); NaN for those that are not defined."""
    unit = vectors / np.where(defined, np.linalg.norm(vectors, axis=1), np.nan)[:, None]
    cosines = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(cosines, np.where(defined, 1.0, np.nan))
    return np.asarray(cosines)
