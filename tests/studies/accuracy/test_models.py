"""The end of tiny models whose attention was replaced."""

from dataclasses import replace

import pytest

from studies.accuracy.approximations import (
    fitted_attention,
    model_approximations,
    setting_columns,
)
from studies.accuracy.capture import propagate
from studies.accuracy.pretrained import FINAL, read_pretrained, run_models
from tests.benchmark.runs import break_backend, pick
from tests.studies.accuracy import runs
from tests.studies.accuracy.runs import pretrained_options


def measure(pretrained, earlier=()):
    return runs.measure(run_models, pretrained, earlier)


def name(variant):
    return setting_columns(variant)["setting"]


@pytest.fixture(scope="module", params=["bert", "llama"])
def run(request, tmp_path_factory):
    settings = pretrained_options(tmp_path_factory.mktemp("models"), request.param)
    pretrained = read_pretrained(settings)
    return pretrained, measure(pretrained)


def test_every_setting_has_its_layers_and_its_end(run):
    pretrained, results = run
    variants = model_approximations(pretrained.approximation)
    assert len({name(variant) for variant in variants}) == len(variants) == 10
    assert [(row["setting"], row["layer"]) for row in results.rows] == [
        (name(variant), layer) for variant in variants for layer in (0, 1, 2, FINAL)
    ]
    for row in results.rows:
        assert row["status"] == "measured"
        assert row["error"] > 0
        if row["layer"] == FINAL:
            last = pick(results, setting=row["setting"], layer=2)
            assert row["error"] == last["error"]
            assert row["perplexity"] != row["replaced_perplexity"]
            assert 0 < row["cosine"] < 1
            assert row["predicted"] == (62 if pretrained.loaded.is_causal else 2 * 4)


def test_errors_are_those_of_the_layers_own_fits(run):
    """Fits that are given to the wrong layer, or shared, would move the error."""
    pretrained, results = run
    variant = replace(pretrained.approximation, estimator="data_aware", listed_keys=0)
    functions = {
        layer: fitted_attention(fit, variant, "reference")
        for layer, fit in pretrained.fit().items()
    }
    expected = propagate(
        pretrained.loaded, pretrained.test, lambda sample: functions[sample.layer](sample)
    )
    for layer, error in enumerate(expected.errors):
        row = pick(results, setting=name(variant), layer=layer)
        assert row["error"] == pytest.approx(error, rel=1e-3)


def test_settings_measured_before_are_kept_and_failures_are_rows(run, monkeypatch):
    pretrained, first = run

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
    alone = f"window 8{', 2 sinks' if pretrained.loaded.is_causal else ''} alone"
    assert pick(results, setting=alone, layer=FINAL)["status"] == "measured"
