"""The Mantel test against all relabellings."""

import itertools
import math

import numpy as np
import pytest

from performers.proteins.reading.mantel import compare_matrices, load_reference_matrix

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def _symmetric(size, seed):
    values = np.random.default_rng(seed).normal(size=(size, size))
    return values + values.T


def _off_diagonal(matrix):
    return matrix[np.triu_indices(len(matrix), k=1)]


def test_blosum62_is_loaded_in_the_order_asked_for():
    matrix = load_reference_matrix("BLOSUM62", "WLIV")
    assert matrix.tolist() == [[11, -2, -3, -3], [-2, 4, 2, 1], [-3, 2, 4, 3], [-3, 1, 3, 4]]


def test_a_matrix_agrees_with_itself_and_with_any_rising_function_of_itself():
    reference = load_reference_matrix("BLOSUM62", AMINO_ACIDS)
    same = compare_matrices(3.0 * reference - 1.0, reference, name="BLOSUM62")
    assert same["pearson"] == pytest.approx(1.0)
    assert same["spearman"] == pytest.approx(1.0)
    assert same["p_value"] == pytest.approx(1 / 10_000)
    assert same["pairs"] == 190
    bent = compare_matrices(np.exp(reference), reference, name="BLOSUM62", permutations=9)
    assert bent["spearman"] == pytest.approx(1.0)
    assert bent["pearson"] < 0.9
    reverse = compare_matrices(-reference, reference, name="BLOSUM62", permutations=99)
    assert reverse["pearson"] == pytest.approx(-1.0)
    assert reverse["p_value"] == 1.0


def test_correlations_are_those_of_the_pairs_off_the_diagonal():
    left, right = _symmetric(9, 1), np.round(_symmetric(9, 2))
    result = compare_matrices(left, right, name="x", permutations=9)
    x, y = _off_diagonal(left), _off_diagonal(right)
    assert result["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    # A rank with ties is the mean of (values below) + 1 and (values up to and including).
    ranks = [[(np.sum(v < value) + 1 + np.sum(v <= value)) / 2 for value in v] for v in (x, y)]
    assert result["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    np.fill_diagonal(left, 50.0)
    # Nor does a second call draw other relabellings.
    assert compare_matrices(left, right, name="x", permutations=9) == result


def test_undefined_labels_are_left_out_of_both_matrices():
    left, right = _symmetric(9, 1), _symmetric(9, 2)
    left[4] = left[:, 4] = np.nan
    keep = [i for i in range(9) if i != 4]
    partial = compare_matrices(left, right, name="x", permutations=99)
    whole = compare_matrices(
        left[np.ix_(keep, keep)], right[np.ix_(keep, keep)], name="x", permutations=99
    )
    assert partial["pearson"] == whole["pearson"]
    assert partial["p_value"] == whole["p_value"]
    assert partial["pairs"] == 28
    assert "1 of 9" in partial["note"]


@pytest.mark.parametrize("similarity", [np.full((9, 9), np.nan), np.ones((9, 9))])
def test_nothing_to_correlate_is_said_not_raised(similarity):
    result = compare_matrices(similarity, _symmetric(9, 1), name="x")
    assert all(map(math.isnan, (result["pearson"], result["spearman"], result["p_value"])))
    assert result["note"]


def test_the_p_values_count_relabellings_of_either_correlation():
    left, right = _symmetric(6, 3), _symmetric(6, 4)
    right += 0.8 * left
    result = compare_matrices(left, right, name="x", permutations=4_999)

    def ranks(matrix: np.ndarray) -> np.ndarray:
        flat = _off_diagonal(matrix)
        ranked = np.zeros_like(matrix)
        ranked[np.triu_indices(len(matrix), k=1)] = flat.argsort().argsort()
        return ranked + ranked.T

    for p_value, x, y in (
        (result["p_value"], left, right),
        (result["spearman_p_value"], ranks(left), ranks(right)),
    ):
        observed = np.corrcoef(_off_diagonal(x), _off_diagonal(y))[0, 1]
        by_chance = [
            np.corrcoef(_off_diagonal(x[np.ix_(order, order)]), _off_diagonal(y))[0, 1]
            for order in map(list, itertools.permutations(range(6)))
        ]
        exact = np.mean(np.array(by_chance) >= observed - 1e-12)
        assert p_value == pytest.approx(exact, abs=0.015)
