"""Errors of kernel estimates on random data."""

import math
from dataclasses import replace

import pytest
import torch

from performers import SoftmaxFeatures
from performers.benchmark.measure import Results
from studies.accuracy import kernel
from studies.accuracy.kernel import MEASURES, kernel_errors, make_data, run_kernel, sample
from studies.accuracy.options import KernelOptions
from tests.benchmark.runs import pick

TINY = KernelOptions(
    kernel_length=40,
    head_dim=6,
    anisotropic_length=30,
    anisotropic_dim=8,
    norms=(1,),
    anisotropic_norms=(2,),
    kernel_feature_counts=(8, 16),
    draws=3,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def measure(settings, earlier=None):
    results = Results.empty("accuracy kernel", settings)
    if earlier is not None:
        results.resume(earlier.content())
    steps = []
    run_kernel(settings, results, lambda done, total: steps.append((done, total)))
    results.steps = steps
    return results


@pytest.fixture(scope="module")
def tiny():
    return measure(TINY)


def problem(length=300, size=70, head_dim=6, scale=0.5):
    draw = generator(1)
    query = torch.randn(length, head_dim, generator=draw) * scale
    key = torch.randn(size, head_dim, generator=draw) * scale
    return query, key, torch.randn(size, 5, generator=draw)


@pytest.mark.parametrize("block", [7, 256, 1000])
def test_errors_are_those_of_the_definition(block, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK_ROWS", block)
    query, key, value = problem()
    features = SoftmaxFeatures(6, 12, generator=generator())
    found = kernel_errors(features, query, key, value)
    exact = (query.double() @ key.double().mT).exp()
    estimate = features.estimate_kernel(query[None], key[None], 1.0)[0].double()
    weights = exact / exact.sum(-1, keepdim=True)
    others = estimate / estimate.sum(-1, keepdim=True)
    outputs, exact_outputs = others @ value.double(), weights @ value.double()
    assert found == pytest.approx(
        {
            "kernel_mse": float((estimate - exact).square().mean()),
            "kernel_relative": float((estimate / exact - 1).square().mean()),
            "matrix_error": float((others - weights).norm() / weights.norm()),
            "output_mse": float((outputs - exact_outputs).square().mean()),
            "output_error": float((outputs - exact_outputs).norm() / exact_outputs.norm()),
        },
        rel=1e-4,
    )


def test_errors_far_beyond_the_truth_are_still_numbers():
    """The square of a relative error of 1e20 does not fit into float32."""
    query, _, value = problem(20, 20, 16, scale=1.0)
    features = SoftmaxFeatures(16, 8, estimator="trigonometric", generator=generator())
    found = kernel_errors(features, query, -query, value)
    assert 1e38 < found["kernel_relative"] < math.inf
    assert all(math.isfinite(error) for error in found.values())


def test_data_have_the_norms_and_eigenvalues_that_they_should():
    made = make_data(replace(TINY, norms=(1, 3), head_dim=8, anisotropic_norms=(3,)))
    assert [length for length, _ in made.values()] == [40, 40, 30]
    for name, eigenvalues in (
        ("isotropic 3", torch.ones(8)),
        ("anisotropic 3", 1 / torch.arange(1, 9)),
    ):
        query, key, value = sample(made[name][1], 20000, generator())
        assert float(value.var()) == pytest.approx(1, rel=0.02)
        for x in (query, key):
            assert x.shape == (20000, 8)
            assert float(x.square().sum(-1).mean()) == pytest.approx(3, rel=0.02)
            expected = 3 * eigenvalues / eigenvalues.sum()
            assert x.var(0).tolist() == pytest.approx(expected.tolist(), rel=0.06)


def test_rows_name_every_pair_that_there_is(tiny):
    pairs = TINY.pairs()
    assert len(pairs) == len(set(pairs)) == 7 * 5 - 2
    assert ("hyperbolic", "antithetic") not in pairs
    assert [(row["data"], row["num_features"]) for row in tiny.rows[:: len(pairs)]] == [
        (data, count) for data in ("isotropic 1", "anisotropic 2") for count in (8, 16)
    ]
    assert len(tiny.rows) == 4 * len(pairs)
    for row in tiny.rows:
        assert row["status"] == "measured"
        assert row["draws"] == 3
        for name in MEASURES:
            low, middle, high = (row[f"{name}{end}"] for end in ("_low", "_median", "_high"))
            assert 0 < low <= middle <= high < math.inf
            assert low <= row[name] <= high
    assert (tiny.rows[0]["length"], tiny.rows[-1]["head_dim"]) == (40, 8)
    assert tiny.steps == [(done, 12) for done in range(1, 13)]


def test_results_can_be_resumed(monkeypatch):
    few = replace(TINY, estimators=("positive", "trigonometric"), projections=("orthogonal",))
    whole, shorter = measure(few), measure(replace(few, kernel_feature_counts=(8,)))
    calls = []

    def count(*arguments):
        calls.append(1)
        return kernel_errors(*arguments)

    monkeypatch.setattr(kernel, "kernel_errors", count)
    again = measure(few, shorter)
    assert len(calls) == 6 * len(few.pairs()) == 12
    strip = [sorted(map(str, row.items())) for row in whole.rows]
    assert sorted(strip) == sorted(sorted(map(str, row.items())) for row in again.rows)


def test_what_is_not_finite_has_failed(monkeypatch):
    def broken(features, *rest):
        errors = kernel_errors(features, *rest)
        if features.projection == "gaussian":
            errors["output_mse"] = math.inf
        return errors

    monkeypatch.setattr(kernel, "kernel_errors", broken)
    settings = replace(
        TINY, anisotropic_norms=(3,), estimators=("positive",), kernel_feature_counts=(8,)
    )
    results = measure(settings)
    row = pick(results, projection="gaussian", data="isotropic 1")
    assert (row["status"], row["reason"]) == ("failed", "output_mse is not finite")
    assert row["output_mse"] is row["output_mse_median"] is None
    assert row["output_error"] > 0
    assert pick(results, projection="orthogonal", data="isotropic 1")["status"] == "measured"
