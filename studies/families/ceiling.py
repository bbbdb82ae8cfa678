"""Hidden residues from pairwise alignments with relatives."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from Bio.Align import PairwiseAligner, substitution_matrices
from torch.utils.data import Dataset

from performers.proteins.inputs.families import family_row
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, encode_sequences
from studies.families.scored import TOKENIZER, Scored
from studies.parts import Part

_LETTERS = {letter: place for place, letter in enumerate(AMINO_ACIDS)}
# Weight of the frequencies beside a relative of 50% identity, whose weight is 1.
_FREQUENCIES = 0.1

# Letters that BLOSUM62 does not have.
_UNALIGNED = str.maketrans("UOJ", "XXX")

Column = tuple[str, float]

_BLOSUM: Any = substitution_matrices.load("BLOSUM62")
# Gaps of 11 + 1 a residue, none at the ends.
_ALIGNER = PairwiseAligner(mode="global", substitution_matrix=_BLOSUM)
_ALIGNER.open_gap_score, _ALIGNER.extend_gap_score = -11, -1
_ALIGNER.end_gap_score = 0


def aligned_residues(protein: str, relative: str) -> tuple[dict[int, str], float]:
    """Residues of a relative by the place in the protein that they are aligned with.

    Also the share of identical ones among the aligned places of the protein that are not ``X``.
    """
    found: dict[int, str] = {}
    letters = (text.translate(_UNALIGNED) for text in (protein, relative))
    for own, other in zip(*_ALIGNER.align(*letters)[0].aligned, strict=True):
        found |= {int(own[0]) + n: relative[int(other[0]) + n] for n in range(own[1] - own[0])}
    seen = [protein[place] == letter for place, letter in found.items() if protein[place] != "X"]
    return found, sum(seen) / max(1, len(seen))


class AlignedRows(Dataset[dict[str, Any]]):
    """The rows of ``scored`` with each relative in the places of the protein.

    As `performers data relatives` writes them: at each place of the protein the residue that is
    aligned with it, or ``X``. The alignment does not see the hidden residues.

    Attributes:
        lengths: Most tokens of each row, (rows,).
    """

    def __init__(self, scored: Scored, relatives: int) -> None:
        self._scored, self._relatives = scored, relatives
        sizes = np.array([len(tokens) for tokens in scored.proteins.tokens])
        self.lengths = sizes * (relatives + 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        others, protein, _ = self._scored.letters(index)
        pairs = [aligned_residues(protein, x)[0] for x in others[: self._relatives]]
        texts = (
            "".join(found.get(place, "X") for place in range(1 + max(found, default=0)))
            for found in pairs
        )
        own = np.asarray(self._scored.proteins.tokens[index])
        row = family_row(own, encode_sequences(TOKENIZER, list(texts)))
        return {**row, "index": index, "epoch": 0}


def vote(column: Sequence[Column]) -> str | None:
    """The most frequent residue, of several that of the first relative; None without any."""
    return Counter(letter for letter, _ in column).most_common(1)[0][0] if column else None


def profile(column: Sequence[Column], frequencies: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Probabilities of the 20 amino acids from the residues aligned with a place.

    ``p(a) = sum_j w_j (s_j [a = b_j] + (1 - s_j) P(a | b_j, a != b_j)) + w_0 f(a)``, divided by its
    sum, where relative ``j`` has the identity ``s_j`` and the residue ``b_j``, ``P`` is that of
    BLOSUM62, ``w_j = s_j / (1 - s_j)`` and ``w_0 = 0.1``.

    Args:
        column: Residue and identity of each relative.
        frequencies: ``f``, shape ``(20,)``.
    """
    total = _FREQUENCIES * frequencies
    for letter, identity in column:
        if letter not in _LETTERS:
            continue
        same = min(max(identity, 0.02), 0.98)
        others = substitutions()[_LETTERS[letter]] * (1 - same)
        others[_LETTERS[letter]] = same
        total = total + same / (1 - same) * others
    return np.asarray(total / total.sum())


@cache
def substitutions() -> npt.NDArray[Any]:
    """``P(a | b, a != b)`` of BLOSUM62 for uniform backgrounds, shape ``(20 b, 20 a)``."""
    scores = np.array([[_BLOSUM[b][a] for a in AMINO_ACIDS] for b in AMINO_ACIDS])
    # Scores are half-bits.
    odds = 2.0 ** (scores / 2) * (1 - np.eye(20))
    return np.asarray(odds / odds.sum(1, keepdims=True))


def measure_ceiling(scored: Scored, relatives: Sequence[int]) -> Part:
    """Accuracy of a vote, and accuracy and perplexity of a profile, by number of relatives.

    With none, both are the frequencies of the residues of all scored proteins.

    Returns:
        By number of relatives ``vote``, ``accuracy``, ``perplexity``, and ``aligned`` (share of
        hidden residues with an aligned one); ``tokens``, ``identity`` of the first relative.
    """
    read = [scored.letters(index) for index in scored.indices]
    counts = Counter("".join(protein for _, protein, _ in read))
    frequencies = np.array([counts[letter] + 1.0 for letter in AMINO_ACIDS])
    frequencies /= frequencies.sum()
    likeliest = AMINO_ACIDS[int(frequencies.argmax())]
    sums = {k: dict.fromkeys(("vote", "accuracy", "aligned", "loss"), 0.0) for k in relatives}
    identities = []
    for others, protein, hidden in read:
        pairs = [aligned_residues(protein, other) for other in others]
        identities.append(pairs[0][1])
        for place, right in hidden.items():
            for k, found in sums.items():
                column = [(seen[place], same) for seen, same in pairs[:k] if place in seen]
                chances = profile(column, frequencies)
                chance = chances[_LETTERS[right]] if right in _LETTERS else 1e-3
                found["vote"] += (vote(column) or likeliest) == right
                found["accuracy"] += AMINO_ACIDS[int(chances.argmax())] == right
                found["aligned"] += bool(column)
                found["loss"] -= math.log(chance)
    tokens = sum(len(hidden) for _, _, hidden in read)
    return {
        "tokens": tokens,
        "proteins": len(read),
        "families": len({scored.proteins.names[index] for index in scored.indices}),
        "identity": float(np.mean(identities)),
        "relatives": {
            str(k): {
                **{name: found[name] / tokens for name in ("vote", "accuracy", "aligned")},
                "perplexity": math.exp(found["loss"] / tokens),
            }
            for k, found in sums.items()
        },
    }
