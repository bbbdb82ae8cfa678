"""Agreement of two similarity matrices over the same labels, with the Mantel permutation test."""

from __future__ import annotations

from typing import Any

import numpy as np
from Bio.Align import substitution_matrices
from numpy.typing import NDArray

# With three labels there are six relabellings, too few to reach any usual significance level.
_MIN_LABELS = 4
_PERMUTATIONS_AT_ONCE = 2_000


def load_reference_matrix(name: str, letters: str) -> NDArray[np.float64]:
    """Load a substitution matrix of Biopython, such as "BLOSUM62", in an order of amino acids.

    Returns:
        (len(letters), len(letters)) scores.
    """
    matrix = substitution_matrices.load(name)
    order = [matrix.alphabet.index(letter) for letter in letters]
    return np.asarray(matrix, dtype=np.float64)[np.ix_(order, order)]


def compare_matrices(
    similarity: NDArray[np.float64],
    reference: NDArray[np.float64],
    *,
    name: str,
    permutations: int = 9_999,
) -> dict[str, Any]:
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

    Returns:
        - `matrix`: name of the reference;
        - `pearson`, `spearman`: correlations over the pairs, of values and of ranks; NaN where
          fewer than four labels are defined or either matrix is constant off the diagonal;
        - `p_value`, `spearman_p_value`: part of relabellings of the similarity, the observed
          labelling included, with a correlation at least as high (one-sided);
        - `pairs`: number of unordered pairs compared; 190 when all twenty amino acids are defined;
        - `permutations`: number of relabellings;
        - `note`: reason that the comparison is partial or undefined, or empty.
    """
    defined = np.isfinite(np.diag(similarity))
    count = int(defined.sum())
    similarity = similarity[np.ix_(defined, defined)]
    reference = reference[np.ix_(defined, defined)]
    above = np.triu_indices(count, k=1)
    observed, expected = similarity[above], reference[above]
    pearson = p_value = spearman = spearman_p_value = float("nan")
    note = ""
    if count < _MIN_LABELS:
        note = f"{count} amino acids have a similarity; at least {_MIN_LABELS} are needed."
    elif np.ptp(observed) == 0 or np.ptp(expected) == 0:
        note = "All pairs have the same similarity, so there is nothing to correlate."
    else:
        if missing := len(defined) - count:
            note = f"{missing} of {len(defined)} amino acids have no similarity and were left out."
        generator = np.random.default_rng(0)
        relabelled = np.array([generator.permutation(count) for _ in range(permutations)])
        ranked = np.zeros_like(similarity)
        ranked[above] = ranked.T[above] = _ranks(observed)
        pearson, p_value = _tested(similarity, expected, relabelled)
        spearman, spearman_p_value = _tested(ranked, _ranks(expected), relabelled)
    return {
        "matrix": name,
        "pearson": pearson,
        "spearman": spearman,
        "p_value": p_value,
        "pairs": len(observed),
        "permutations": permutations,
        "note": note,
        "spearman_p_value": spearman_p_value,
    }


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
    target = expected - expected.mean()
    target = target / np.linalg.norm(target)
    # Relabelling permutes the entries among themselves: their mean and spread stay as they are.
    scaled = (similarity - observed.mean()) / np.linalg.norm(observed - observed.mean())
    correlation = float(scaled[rows, columns] @ target)
    hits = 0
    for start in range(0, len(relabelled), _PERMUTATIONS_AT_ONCE):
        labels = relabelled[start : start + _PERMUTATIONS_AT_ONCE]
        by_chance = scaled[labels[:, rows], labels[:, columns]] @ target
        hits += int((by_chance >= correlation - 1e-12).sum())
    return min(1.0, max(-1.0, correlation)), (1 + hits) / (1 + len(relabelled))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], dtype=np.float64)
