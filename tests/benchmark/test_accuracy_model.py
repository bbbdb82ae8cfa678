"""The end of tiny models whose attention was replaced."""

import math
from dataclasses import replace

import pytest

from performers.benchmark.accuracy_approximations import (
    fitted_attention,
    model_approximations,
    setting_name,
)
from performers.benchmark.accuracy_model import FINAL, propagation_results, run_propagation
from performers.benchmark.accuracy_passages import read_pretrained
from performers.benchmark.heads import capture_heads
from performers.benchmark.propagation import propagate
from performers.benchmark.replacement import exact_attention
from performers.planning.fits import Fits
from tests.benchmark.pretrained_runs import pretrained_settings
from tests.benchmark.runs import break_backend, pick


def measure(pretrained, earlier=()):
    results = propagation_results(pretrained)
    results.rows = list(earlier)
    run_propagation(pretrained, results)
    return results


@pytest.fixture(scope="module", params=["bert", "llama"])
def run(request, tmp_path_factory):
    settings = pretrained_settings(tmp_path_factory.mktemp("models"), request.param)
    pretrained = read_pretrained(settings)
    return pretrained, measure(pretrained)


def test_every_setting_has_its_layers_and_its_end(run):
    pretrained, results = run
    variants = model_approximations(pretrained.approximation)
    assert len({setting_name(variant) for variant in variants}) == len(variants) == 10
    assert [(row["setting"], row["layer"]) for row in results.rows] == [
        (setting_name(variant), layer) for variant in variants for layer in (0, 1, 2, FINAL)
    ]
    for row in results.rows:
        assert row["status"] == "measured"
        assert row["error"] > 0
        if row["layer"] == FINAL:
            last = pick(results, setting=row["setting"], layer=2)
            assert row["error"] == last["error"]
            assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
            assert row["replaced_perplexity"] == pytest.approx(math.exp(row["replaced_loss"]))
            assert 0 < row["cosine"] < 1
            assert row["predicted"] == (62 if pretrained.loaded.is_causal else 2 * 4)


def test_errors_are_those_of_the_layers_own_fits(run):
    """Fits that are given to the wrong layer, or shared, would move the error."""
    pretrained, results = run
    variant = replace(pretrained.approximation, estimator="data_aware", listed_keys=0)
    fits = {
        sample.layer: Fits(sample, sample.layer)
        for sample in capture_heads(pretrained.loaded, pretrained.calibration)
    }
    functions = {
        layer: fitted_attention(fit, variant, fit.samples.query.shape[1], "reference")
        for layer, fit in fits.items()
    }

    def attention(layer, *tensors, **options):
        return functions[layer](layer, *tensors, **options)

    expected = propagate(pretrained.loaded, pretrained.test, attention)
    for entry in expected.layers:
        row = pick(results, setting=setting_name(variant), layer=entry.layer)
        assert row["error"] == pytest.approx(entry.error, rel=1e-3)


def test_exact_terms_lower_the_error(run):
    pretrained, results = run
    sinks = ", 2 sinks" if pretrained.loaded.is_causal else ""
    near = pick(results, setting=f"data_aware, window 8{sinks}, 4 listed keys", layer=FINAL)
    assert near["error"] < pick(results, setting="data_aware", layer=FINAL)["error"]


def test_attention_of_another_kind_is_told_from_the_right_one(run):
    """The measure itself: no error where nothing is replaced."""
    pretrained, _ = run
    found = propagate(pretrained.loaded, pretrained.test, exact_attention)
    assert found.final < 1e-5


def test_settings_measured_before_are_kept_and_failures_are_rows(tmp_path, monkeypatch):
    pretrained = read_pretrained(pretrained_settings(tmp_path, "bert"))
    first = measure(pretrained)

    def attend(right, call):
        raise RuntimeError("broken")

    break_backend(monkeypatch, "torch", attend)
    kept = [row for row in first.rows if row["setting"] == "positive"]
    results = measure(pretrained, kept)
    assert [row for row in results.rows if row["setting"] == "positive"] == kept
    row = pick(results, setting="data_aware")
    assert (row["layer"], row["status"]) == (FINAL, "failed")
    assert row["reason"] == "RuntimeError: broken"
    # The one without features needs no backend.
    assert pick(results, setting="window 8 alone", layer=FINAL)["status"] == "measured"
