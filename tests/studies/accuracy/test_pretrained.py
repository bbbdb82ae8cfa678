"""Errors on the heads and at the end of tiny pretrained models."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from performers import SoftmaxFeatures, favor_attention
from performers.attention import ListedKeys
from performers.nn import Approximation
from performers.planning.planner import pareto_front
from studies.accuracy import pretrained as module
from studies.accuracy.approximations import (
    SDPA,
    fitted_attention,
    head_approximations,
    model_approximations,
    setting_columns,
)
from studies.accuracy.capture import capture_heads, propagate
from studies.accuracy.pretrained import FINAL, MEAN, read_pretrained, run_heads, run_models
from tests.benchmark.runs import break_backend, pick
from tests.studies.accuracy.runs import compare_few, measure, pretrained_options


@pytest.fixture(scope="module", params=["bert", "llama"])
def model(request, tmp_path_factory):
    options = pretrained_options(tmp_path_factory.mktemp("models"), request.param, layers=(1, 2))
    return read_pretrained(options)


@pytest.fixture(scope="module")
def heads(model):
    return model, measure(run_heads, model)


@pytest.fixture(scope="module")
def ends(model):
    return model, measure(run_models, model)


@pytest.fixture
def bert(tmp_path):
    return read_pretrained(pretrained_options(tmp_path, "bert"))


def by_hand(pretrained, layer, estimator, num_features, window, keys):
    """The relative error of a setting, over both passages, each fitted map made anew."""
    causal = pretrained.loaded.is_causal
    (fitted,) = capture_heads(pretrained.loaded, pretrained.calibration, layers=[layer])
    (test,) = capture_heads(pretrained.loaded, pretrained.test, layers=[layer])
    heads = test.query.shape[1]

    def seeded():
        return torch.Generator().manual_seed(layer)

    options = {"is_causal": causal, "window": window, "sinks": 2 if causal and window else 0}
    features = SoftmaxFeatures(
        8, num_features, estimator=estimator, num_heads=heads, generator=seeded()
    )
    features.calibrate_(fitted.query, fitted.key, scale=fitted.scale, **options)
    listed_keys = None
    if keys:
        listed_keys = ListedKeys(8, 16, keys, num_heads=heads, generator=seeded())
        listed_keys.calibrate_(fitted.query)
    output = favor_attention(
        test.query, test.key, test.value, features,
        scale=test.scale, listed_keys=listed_keys, backend="reference", **options,
    )  # fmt: skip
    exact = F.scaled_dot_product_attention(
        test.query, test.key, test.value, is_causal=causal, scale=test.scale, enable_gqa=True
    )
    return float((output - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("estimator", "num_features", "window", "keys"),
    [
        ("positive", 8, None, 0),
        ("data_aware", 16, None, 0),
        ("trigonometric", 16, 8, 0),
        ("sderf", 16, 8, 0),
        ("data_aware", 8, 4, 4),
    ],
)
def test_errors_are_those_of_attention_fitted_to_other_passages(
    heads, estimator, num_features, window, keys
):
    pretrained, results = heads
    wanted = {"num_features": num_features, "window": window, "keys": keys}
    row = pick(results, layer=1, estimator=estimator, projection="orthogonal", **wanted)
    expected = by_hand(pretrained, 1, estimator, num_features, window, keys)
    assert row["status"] == "measured"
    assert row["error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("keys", [0, 4])
def test_exact_terms_alone_are_softmax_over_them(heads, keys):
    pretrained, results = heads
    causal, window = pretrained.loaded.is_causal, 4 if keys else 8
    (fitted,) = capture_heads(pretrained.loaded, pretrained.calibration, layers=[2])
    (test,) = capture_heads(pretrained.loaded, pretrained.test, layers=[2])
    num_heads = test.query.shape[1]
    group = num_heads // test.key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (test.key, test.value))
    scores = test.scale * test.query @ key.mT
    seen = torch.ones(32, 32, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    near = seen & seen.triu(-window) & seen.tril(window)
    if causal:
        near[:, :2] = seen[:, :2]
    near = near.expand_as(scores).clone()
    if keys and not causal:
        # Causal lists hold keys of 128 positions before at the least, and there are 32.
        generator = torch.Generator().manual_seed(2)
        listed_keys = ListedKeys(8, 16, keys, num_heads=num_heads, generator=generator)
        listed_keys.calibrate_(fitted.query)
        for head in range(num_heads):
            centers, offsets = listed_keys.centers[0, head], listed_keys.offsets[0, head]
            for passage in range(2):
                lists = (centers @ key[passage, head].mT).topk(keys, dim=-1).indices
                own = (test.query[passage, head] @ centers.mT + offsets).argmax(-1)
                for query in range(32):
                    near[passage, head, query, lists[own[query]]] = True
    output, exact = (
        scores.masked_fill(~mask, -math.inf).softmax(-1) @ value for mask in (near, seen)
    )
    name = (
        f"window {window}{', 2 sinks' if causal else ''}{', 4 listed keys' if keys else ''} alone"
    )
    row = pick(results, layer=2, setting=name)
    assert row["error"] == pytest.approx(float((output - exact).norm() / exact.norm()), rel=1e-4)
    mean = pick(results, layer=MEAN, setting=name)
    assert mean["status"] == "measured"
    assert mean["seconds"] is None
    assert mean["error"] > 0


def test_every_layer_has_every_setting_and_the_mean_its_time(heads):
    pretrained, results = heads
    variants = head_approximations(pretrained.approximation, (8, 16))
    assert [row["layer"] for row in results.rows] == [
        layer for layer in (1, 2) for _ in variants
    ] + [MEAN] * (len(variants) + 1)
    sinks = 2 if pretrained.loaded.is_causal else 0
    assert {row.get("sinks") for row in results.rows if row.get("window")} == {sinks}
    exact = pick(results, setting=SDPA)
    assert exact["error"] == 0
    assert exact["sdpa_ratio"] == 1
    for variant in variants:
        which = {
            "setting": setting_columns(variant)["setting"],
            "num_features": variant.num_features,
        }
        errors = [pick(results, layer=layer, **which)["error"] for layer in (1, 2)]
        row = pick(results, layer=MEAN, **which)
        assert row["error"] == pytest.approx(sum(errors) / 2)
        assert (row["error_low"], row["error_high"]) == (min(errors), max(errors))
        if variant.num_features:
            assert row["seconds"] > 0
            assert row["sdpa_ratio"] == pytest.approx(exact["seconds"] / row["seconds"])
    timed = [row for row in results.rows if row.get("seconds")]
    front = pareto_front(timed, lambda row: (row["seconds"], row["error"]))
    assert [row for row in timed if row["front"]] == sorted(front, key=timed.index)
    assert exact["front"]


def test_settings_are_told_apart():
    variants = head_approximations(
        Approximation(256, window=64, sinks=4, listed_keys=32), (64, 1024)
    )
    names = [(setting_columns(one)["setting"], one.num_features) for one in variants]
    assert len(set(names)) == len(names)
    assert ("positive", 1024) in names
    assert ("data_aware, window 64, 4 sinks", 64) in names
    assert ("data_aware, window 32, 4 sinks, 32 listed keys", 1024) in names
    assert ("data_aware, simplex, window 64, 4 sinks", 256) in names
    assert ("window 64, 4 sinks alone", 0) in names
    assert ("optimal", 64) not in names


def test_layers_are_chosen(bert, monkeypatch):
    compare_few(monkeypatch, 12)
    some = replace(bert, options=replace(bert.options, layers=(2, 0)))
    results = measure(run_heads, some)
    assert list(dict.fromkeys(row["layer"] for row in results.rows)) == [0, 2, MEAN]
    assert bert.chosen_layers(list(range(30))) == [0, 5, 10, 15, 20, 25, 29]
    assert bert.chosen_layers(list(range(8))) == list(range(8))
    wrong = replace(bert, options=replace(bert.options, layers=(0, 3)))
    with pytest.raises(ValueError, match=r"attention layers \[0, 1, 2\], got \[0, 3\]"):
        measure(run_heads, wrong)


def test_layers_measured_before_are_kept(bert, monkeypatch):
    compare_few(monkeypatch)
    first = measure(run_heads, bert)
    calls = []
    layer_row = module._layer_row

    def count(*arguments):
        calls.append(1)
        return layer_row(*arguments)

    monkeypatch.setattr(module, "_layer_row", count)
    again = measure(run_heads, bert, [row for row in first.rows if row["layer"] != 1])
    assert len(calls) == len([row for row in first.rows if row["layer"] == 1])
    errors = {(r["layer"], r["setting"], r["num_features"]): r["error"] for r in first.rows}
    assert {
        (r["layer"], r["setting"], r["num_features"]): r["error"] for r in again.rows
    } == pytest.approx(errors)


def test_a_wrong_backend_fails_and_the_rest_is_measured(bert, monkeypatch):
    def without_lists(right, call):
        return right(call.replaced(lists=None))

    break_backend(monkeypatch, "torch", without_lists)
    results = measure(run_heads, replace(bert, options=replace(bert.options, layers=(0,))))
    for row in results.rows:
        if row.get("keys") and row["estimator"]:
            assert row["status"] == "failed"
            assert row["error"] is None
            wrong = "differs from the reference" if row["layer"] == 0 else "failed on a layer"
            assert wrong in row["reason"]
        else:
            assert row["status"] == "measured"
            assert row["error"] is not None


def test_passages_for_fitting_are_not_those_of_the_test(tmp_path):
    settings = pretrained_options(tmp_path, "llama", calibration=None, passages=2)
    pretrained = read_pretrained(settings)
    assert pretrained.calibration.shape == (2, 32)
    assert pretrained.test.shape == (2, 32)
    more = replace(settings, calibration_passages=4)
    every = read_pretrained(more).calibration
    assert torch.equal(torch.cat([pretrained.calibration, pretrained.test]), every)


def test_what_cannot_be_read_is_named(tmp_path):
    settings = pretrained_options(tmp_path, "bert")
    with pytest.raises(FileNotFoundError, match="absent: no such model folder"):
        read_pretrained(replace(settings, model=str(tmp_path / "absent")))
    with pytest.raises(FileNotFoundError, match=r"absent\.txt: no such text file"):
        read_pretrained(replace(settings, text=str(tmp_path / "absent.txt")))
    with pytest.raises(ValueError, match="length must be at most 40, the positions that"):
        read_pretrained(replace(settings, length=41))
    (tmp_path / "above" / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="has no tokenizer files"):
        read_pretrained(settings)


def name(variant):
    return setting_columns(variant)["setting"]


def test_every_setting_has_its_layers_and_its_end(ends):
    pretrained, results = ends
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


def test_errors_are_those_of_the_layers_own_fits(ends):
    """Fits that are given to the wrong layer, or shared, would move the error."""
    pretrained, results = ends
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


def test_settings_measured_before_are_kept_and_failures_are_rows(ends, monkeypatch):
    pretrained, first = ends

    def attend(right, call):
        raise RuntimeError("broken")

    break_backend(monkeypatch, "torch", attend)
    kept = [row for row in first.rows if row["setting"] == "positive"]
    results = measure(run_models, pretrained, kept)
    assert [row for row in results.rows if row["setting"] == "positive"] == kept
    row = pick(results, setting="data_aware")
    assert (row["layer"], row["status"]) == (FINAL, "failed")
    assert row["reason"] == "RuntimeError: broken"
    # The one without features needs no backend.
    alone = f"window 8{', 2 sinks' if pretrained.loaded.is_causal else ''} alone"
    assert pick(results, setting=alone, layer=FINAL)["status"] == "measured"
