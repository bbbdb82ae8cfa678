"""Scores of attention heads, which tell local, global and vertical ones apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLUMN_FRACTION = 0.05
"""The part of a protein's residues that counts as the most attended columns."""


@dataclass(frozen=True)
class HeadScore:
    """The scores of one head, see `local_global_score`; layer and head count from 1."""

    layer: int
    head: int
    mean_distance: float
    band_share: float
    column_share: float
    special_share: float

    @property
    def label(self) -> str:
        """`layer.head`, both from 1."""
        return f"{self.layer}.{self.head}"


@dataclass(frozen=True)
class HeadScores:
    """The scores of all heads on a protein, with what uniform attention would score.

    Attributes:
        heads: One score per head, in the order of the layers.
        uniform: The scores of attention spread evenly over the residues that a query may attend
            to; its layer and head are 0.
        band: Half-width, in residues, behind `band_share`.
    """

    heads: tuple[HeadScore, ...]
    uniform: HeadScore
    band: int

    def kinds(self) -> dict[str, list[HeadScore]]:
        """Local, global and vertical heads; those without attention between residues are none.

        A local head has at least twice the band share of uniform attention, a vertical one at
        least twice its column share, a global one at least 90% of its mean distance.
        """
        uniform = self.uniform
        found = [score for score in self.heads if math.isfinite(score.mean_distance)]
        return {
            "local": [h for h in found if h.band_share >= 2 * uniform.band_share],
            "global": [h for h in found if h.mean_distance >= 0.9 * uniform.mean_distance],
            "vertical": [h for h in found if h.column_share >= 2 * uniform.column_share],
        }


def local_global_score(
    attentions: Sequence[Tensor], residues: Tensor, *, band: int = 8, is_causal: bool = False
) -> HeadScores:
    r"""Score how far, and on how few residues of a protein, each head attends.

    With A the attention of one head, the sums running over the pairs (i, j) of residues, and i, j
    positions in the row:

    - mean distance = Σ A_ij |i - j| / Σ A_ij (Vig and Belinkov, 2019), in residues;
    - band share = Σ_{|i - j| <= band} A_ij / Σ A_ij;
    - column share = Σ_{j in top} A_ij / Σ A_ij, where top holds the ceil(0.05 n) of n residues that
      receive most attention in this head;
    - special share = 1 - Σ A_ij / Σ_{i a residue, any j} A_ij, of tokens such as `<bos>`.

    The reference, uniform attention, gives each residue i the same weight on each residue j (j <= i
    for a causal model). Without `is_causal` its mean distance is (n² - 1) / 3n.

    Args:
        attentions: One tensor (H, L, L) per layer, rows being queries.
        residues: Boolean (L,), True at residues, of which there is one at least.
        band: Half-width of the band, in residues.
        is_causal: Whether a query sees only itself and the past, which changes the reference.

    Returns:
        Scores in layer order. A head with no attention between residues has NaN scores.
    """
    residues = residues.cpu()
    pairs = residues[:, None] & residues
    allowed = pairs.tril() if is_causal else pairs
    uniform = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
    scores: list[HeadScore] = []
    for layer, weights in enumerate(attentions, start=1):
        scores += _score_layer(weights, residues, band, layer)
    (reference,) = _score_layer(uniform[None], residues, band, 0)
    return HeadScores(tuple(scores), reference, band)


def looks_causal(maps: Sequence[NDArray[np.floating[Any]]]) -> bool:
    """Return True if no head of the maps (heads, n, n) looks ahead while some look back."""
    ahead = any(bool(np.triu(layer, 1).any()) for layer in maps)
    return not ahead and any(bool(np.tril(layer, -1).any()) for layer in maps)


def _score_layer(weights: Tensor, residues: Tensor, band: int, layer: int) -> list[HeadScore]:
    from_residues = weights.cpu().double().masked_fill(~residues[:, None], 0.0)
    emitted = from_residues.sum((1, 2))
    between = from_residues.masked_fill(~residues, 0.0)
    total = between.sum((1, 2))
    position = torch.arange(len(residues))
    gap = (position[:, None] - position).abs()
    distance = (between * gap).sum((1, 2)) / total
    band_share = between.masked_fill(gap > band, 0.0).sum((1, 2)) / total
    count = math.ceil(COLUMN_FRACTION * int(residues.sum()))
    top = between.sum(1).topk(count, dim=-1).values.sum(-1)
    stacked = torch.stack([distance, band_share, top / total, 1.0 - total / emitted], dim=1)
    # A head that pays nothing to residues divides by zero: infinities would sort as "global".
    stacked[~torch.isfinite(stacked)] = math.nan
    return [HeadScore(layer, head, *row) for head, row in enumerate(stacked.tolist(), start=1)]
