"""Agreement of two similarity matrices over the same labels, with the Mantel permutation test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from Bio.Align import substitution_matrices
from numpy.typing import NDArray

# With three labels there are six relabellings, too few to reach any usual significance level.
_MIN_LABELS = 4
_PERMUTATIONS_AT_ONCE = 2_000


@dataclass(frozen=True)
class MatrixComparison:
    """Agreement of a similarity matrix with a reference, off the diagonal.

    Attributes:
        matrix: Name of the reference matrix.
        pearson: Pearson correlation over the pairs; NaN where undefined.
        spearman: Spearman rank correlation over the pairs; NaN where undefined.
        p_value: One-sided Mantel test: the part of relabellings of the similarity, the observed
            labelling included, with a Pearson correlation at least as high; NaN where undefined.
        pairs: Number of unordered pairs compared; 190 when all twenty amino acids are defined.
        permutations: Number of random relabellings.
        note: Reason that the comparison is partial or undefined; empty otherwise.
        spearman_p_value: The same test of the rank correlation.
    """

    matrix: str
    pearson: float
    spearman: float
    p_value: float
    pairs: int
    permutations: int
    note: str = ""
    spearman_p_value: float = float("nan")


def load_reference_matrix(name: str, letters: str) -> NDArray[np.float64]:
    """Load a substitution matrix of Biopython in a given order of amino acids.

    Args:
        name: Its name, such as "BLOSUM62" or "PAM250".
        letters: The amino acids in the order wanted.

    Returns:
        (len(letters), len(letters)) scores.

    Raises:
        ValueError: Biopython has no matrix of this name, or it does not score amino acids.
    """
    known = substitution_matrices.load()
    if name not in known:
        raise ValueError(f"matrix_name must be one of {', '.join(known)}; got {name!r}")
    matrix = substitution_matrices.load(name)
    alphabet = list(matrix.alphabet)
    if not set(letters) <= set(alphabet):
        raise ValueError(f"matrix_name must score amino acids, {name} does not: try BLOSUM62")
    order = [alphabet.index(letter) for letter in letters]
    return np.asarray(matrix, dtype=np.float64)[np.ix_(order, order)]


def compare_matrices(
    similarity: NDArray[np.float64],
    reference: NDArray[np.float64],
    *,
    name: str,
    permutations: int = 9_999,
    seed: int = 0,
) -> MatrixComparison:
    """Correlate two symmetric matrices off the diagonal and test the correlation.

    The entries of a matrix of similarities depend on one another through their labels, so the
    usual test of a correlation does not apply. The Mantel test (1967) relabels one matrix at
    random, rows and columns together, and counts how often the correlation reaches the observed
    one: p = (1 + hits) / (1 + permutations).

    Args:
        similarity: Symmetric (n, n); a label whose row is NaN is left out of both matrices.
        reference: Symmetric (n, n), finite.
        name: Name of the reference, for the result.
        permutations: Number of random relabellings, at least 1.
        seed: Seed of the relabellings.

    Returns:
        The comparison; correlations and p-value are NaN, with a note, where fewer than four
        labels are defined or either matrix is constant off the diagonal.

    Raises:
        ValueError: `permutations` is below 1 or the shapes differ.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    if similarity.shape != reference.shape or similarity.ndim != 2:
        raise ValueError(
            f"similarity and reference must be square and alike, got {similarity.shape} and "
            f"{reference.shape}"
        )
    defined = np.isfinite(np.diag(similarity))
    count = int(defined.sum())
    pairs = count * (count - 1) // 2

    def undefined(reason: str) -> MatrixComparison:
        nan = float("nan")
        return MatrixComparison(name, nan, nan, nan, pairs, permutations, reason)

    if count < _MIN_LABELS:
        return undefined(
            f"{count} amino acids have a similarity; at least {_MIN_LABELS} are needed."
        )
    similarity = similarity[np.ix_(defined, defined)]
    reference = reference[np.ix_(defined, defined)]
    rows, columns = np.triu_indices(count, k=1)
    observed, expected = similarity[rows, columns], reference[rows, columns]
    if np.ptp(observed) == 0 or np.ptp(expected) == 0:
        return undefined("All pairs have the same similarity, so there is nothing to correlate.")

    generator = np.random.default_rng(seed)
    relabelled = np.array([generator.permutation(count) for _ in range(permutations)])
    ranked = np.zeros_like(similarity)
    ranked[rows, columns] = ranked[columns, rows] = _ranks(observed)
    pearson, p_value = _tested(similarity, expected, relabelled)
    spearman, spearman_p_value = _tested(ranked, _ranks(expected), relabelled)
    missing = len(defined) - count
    left_out = f"{missing} of {len(defined)} amino acids have no similarity and were left out."
    return MatrixComparison(
        matrix=name,
        pearson=pearson,
        spearman=spearman,
        p_value=p_value,
        pairs=pairs,
        permutations=permutations,
        note=left_out if missing else "",
        spearman_p_value=spearman_p_value,
    )


def _tested(
    similarity: NDArray[np.float64],
    expected: NDArray[np.float64],
    relabelled: NDArray[np.int64],
) -> tuple[float, float]:
    """Correlation of a symmetric (n, n) with the values of its pairs, and its p-value.

    Args:
        similarity: Symmetric (n, n).
        expected: (n (n - 1) / 2,), in the order of `numpy.triu_indices`.
        relabelled: (permutations, n) orders of the labels.
    """
    rows, columns = np.triu_indices(len(similarity), k=1)
    observed = similarity[rows, columns]
    target = _standardised(expected)
    # Relabelling permutes the entries among themselves: their mean and spread stay as they are.
    scaled = (similarity - observed.mean()) / np.linalg.norm(observed - observed.mean())
    correlation = float(scaled[rows, columns] @ target)
    hits = 0
    for start in range(0, len(relabelled), _PERMUTATIONS_AT_ONCE):
        labels = relabelled[start : start + _PERMUTATIONS_AT_ONCE]
        by_chance = scaled[labels[:, rows], labels[:, columns]] @ target
        hits += int((by_chance >= correlation - 1e-12).sum())
    return min(1.0, max(-1.0, correlation)), (1 + hits) / (1 + len(relabelled))


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = values - values.mean()
    return np.asarray(centred / np.linalg.norm(centred))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], dtype=np.float64)
