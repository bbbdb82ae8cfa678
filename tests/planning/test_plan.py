"""The whole call: measured errors are those of ``favor_attention``, times, text, and build."""

import io
import json
import sys
from dataclasses import replace

import pytest
import torch

import performers
from performers.planning import measuring, planner
from performers.planning.table import number

from . import heads

GRID = {
    "num_features": (32,),
    "windows": (None, 8),
    "sinks": (0, 1),
    "listed_keys": (0, 16),
    "backend": "torch",
    "show": False,
}
FEW = {**GRID, "windows": (None,), "listed_keys": (0,)}


@pytest.fixture(scope="module")
def plan():
    samples = heads.structured(batch=3, heads=4, key_heads=2, length=64)
    options = {**GRID, "num_features": (16, 64), "num_draws": 1}
    return performers.plan(*samples, is_causal=True, length=100, **options)


def test_a_plan_holds_its_measurements(plan):
    assert len(plan.settings) == 32
    assert (plan.length, plan.sample_shape, plan.held_out) == (100, (3, 4, 2, 64, 16), (1, 64))
    assert plan.recommended in plan.front
    assert set(plan.front) <= {setting for setting in plan.settings if setting.timed}
    for faster, slower in zip(plan.front, plan.front[1:], strict=False):
        assert faster.seconds < slower.seconds
        assert faster.error > slower.error
    for setting in plan.settings:
        assert setting.ratio == pytest.approx(setting.seconds / plan.exact_seconds)
        assert len(setting.head_errors) == 4
        assert setting.error_sd is None
        assert not setting.timed or any(
            x.error <= setting.error and x.seconds <= setting.seconds for x in plan.front
        )
    plain = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert [setting["error"] for setting in plain["settings"]] == [s.error for s in plan.settings]
    assert plain["recommended"]["seconds"] == plan.recommended.seconds
    assert plain["diagnosis"]["window_shares"]["8"] == plan.diagnosis.window_shares[8]
    assert plain["diagnosis"]["variances"][0]["estimator"] == "positive"
    assert plain["held_out"] == [1, 64]
    assert "samples" not in plain


@pytest.mark.parametrize("every", [False, True])
def test_the_table(plan, every):
    text = plan.table() if every else str(plan)
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["estimator"])
    rows = lines[start + 1 : lines.index("", start)]
    assert max(map(len, lines)) <= 100
    assert rows[0].startswith("->")
    assert f"{plan.recommended.error:.3f}" in rows[0]
    assert rows[-1].split()[0] == "exact"
    assert len([row for row in rows if row.startswith((" *", "->"))]) == len(plan.front)
    assert (len(rows) == 33) is every
    assert ("more settings in plan.settings" in text.replace("\n", " ")) is not every
    options = {"heads": "query", "num_features": 16384, "window": 16384, "sinks": 1000}
    options |= {"listed_keys": 1024, "error_sd": 10.123, "ratio": 9876.5, "multiply_adds": 1.2e8}
    wide = heads.setting(12.345, 98.7654, **{**options, "estimator": "hyperbolic"})
    one = replace(plan, settings=(wide,), front=(wide,), recommended=wide)
    assert max(len(line) for line in str(one).splitlines()) <= 100
    numbers = {0.01234: "0.0123", 1.234: "1.23", 45.67: "45.7", 1234.5: "1,234", 0: "0"}
    assert {x: number(x) for x in numbers} == numbers


def test_the_recommendation_in_words(plan):
    samples = heads.structured(batch=2, length=48)
    missed, late = (
        performers.plan(*samples, **target, **FEW)
        for target in ({"target_error": 1e-3}, {"target_time": 1e-9})
    )
    assert not missed.met
    assert missed.recommended.error == min(s.error for s in missed.front)
    assert not late.met
    assert late.recommended == late.front[0]
    slow = replace(plan.recommended, ratio=12.5, seconds=0.0125)
    slower = replace(plan, recommended=slow, exact_seconds=1e-3, length=512)
    faster = replace(plan, recommended=replace(slow, ratio=0.25), exact_seconds=0.05)
    for x, words in (
        (missed, "NOTHING reaches an error of 0.001"),
        (late, "NOTHING is within"),
        (slower, "prefer it here"),
        (slower, "from about 6,400 positions on"),
        (faster, "50.0 ms, 4 times as long"),
    ):
        assert words in str(x).replace("\n", " ")
    assert "NOTHING" not in str(plan)
    assert "prefer it here" not in str(faster).replace("\n", " ")


def test_a_recommendation_that_is_no_good_is_called_so(plan):
    good = replace(plan, recommended=replace(plan.recommended, error=0.5))
    assert good.is_usable
    assert "NO GOOD" not in str(good)
    poor = replace(plan, recommended=replace(plan.recommended, error=0.51))
    assert not poor.is_usable
    least = min(plan.settings, key=lambda setting: setting.error)
    words = " ".join(str(poor).split())
    assert "NO GOOD: an error above 0.5 is more than half of the output" in words
    assert f"the least is {least.error:.3f}, of {least.label()}. Measure larger" in words
    worst = replace(poor, settings=(poor.recommended,), front=(poor.recommended,))
    assert "no setting has less. Measure larger" in " ".join(str(worst).split())
    # Independent queries and keys of length two have nothing that few features could find.
    noise = torch.randn(3, 2, 1, 64, 16, generator=torch.Generator().manual_seed(0))
    assert not performers.plan(*(3 * noise), **FEW).is_usable


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_show(capsys, monkeypatch):
    """The plan on stdout; progress on stderr if that is a terminal, and erased at the end."""
    samples = heads.structured(batch=2, length=24)
    plan = performers.plan(*samples, **{**FEW, "show": True})
    assert capsys.readouterr() == (f"{plan}\n", "")
    for show in (False, True):
        monkeypatch.setattr(sys, "stderr", Terminal())
        performers.plan(*samples, **{**FEW, "show": show})
        written = sys.stderr.getvalue()
        assert bool(written) is show
    assert "plan: errors 4/4" in written
    *_, before, last, end = written.split("\r")
    assert before.startswith("plan: times")
    assert (last, end) == (" " * len(before), "")


def test_settings_that_others_clearly_beat_are_not_timed_again(monkeypatch):
    """Calls take a known time, twice as long as when errors were measured."""
    first = [(0.5, 1.0), (0.4, 4.0), (0.6, 1.5), (0.6, 2.5), (0.4, 30.0)]
    settings, calls = [heads.setting(*x) for x in first], []
    monkeypatch.setattr(measuring, "attend", lambda one, *_: lambda: calls.append(one))
    monkeypatch.setattr(measuring, "exact_attention", lambda *_, **__: calls.append(None))

    def timed(call, device):
        call()
        return None, 0.25 if calls[-1] is None else 2 * calls[-1].seconds

    monkeypatch.setattr(measuring, "timed", timed)
    samples = planner.checked_samples(
        *heads.structured(batch=1, length=16), is_causal=False, key_mask=None, scale=None, seed=0
    )
    arguments = samples, None, "torch", measuring.Progress(False), 0
    measured, exact_seconds = measuring.measure_times(settings, *arguments)
    assert exact_seconds == 0.25
    assert [x.seconds for x in measured] == [2.0, 8.0, 3.0, 5.0, 60.0]
    assert [x.timed for x in measured] == [True, True, True, False, False]
    # One call to warm up, and one a round.
    assert [calls.count(x) for x in settings] == [4, 4, 4, 0, 0]


def by_hand(tensors, setting, *, seed=0, scale=None, key_mask=None, is_causal=False):
    """A calibrated feature map and the options of its call."""
    query, key, _ = tensors
    count = key.shape[1] if setting.heads == "key" else query.shape[1]
    options = {"is_causal": is_causal, "window": setting.window, "sinks": setting.sinks}
    options["scale"] = scale
    features = performers.SoftmaxFeatures(
        16,
        setting.num_features,
        estimator=setting.estimator,
        num_heads=count,
        generator=torch.Generator().manual_seed(seed),
    ).calibrate_(query, key, key_mask, **options)
    listed_keys = None
    if setting.listed_keys:
        listed_keys = performers.ListedKeys(16, 16, setting.listed_keys, num_heads=count)
        listed_keys.calibrate_(query)
    return features, {**options, "listed_keys": listed_keys, "backend": "torch"}


@pytest.mark.parametrize(
    ("is_causal", "key_heads", "masked", "options"),
    [
        (False, 2, True, {"sinks": (1,)}),
        (True, 1, True, {"windows": (8,), "listed_keys": (16,)}),
    ],
)
def test_errors_are_those_of_favor_attention(is_causal, key_heads, masked, options):
    samples = heads.structured(batch=4, key_heads=key_heads, length=64, seed=3)
    mask = torch.arange(64) < torch.tensor([64, 40, 50, 33]).unsqueeze(1) if masked else None
    kind, chosen = {"is_causal": is_causal}, {**GRID, "heads": ("key", "query"), **options}
    plan = performers.plan(*samples, key_mask=mask, seed=5, **kind, **chosen)
    assert len(plan.settings) == 8
    calibration, held_out = ([x[half] for x in samples] for half in (slice(2), slice(2, 4)))
    first, second = (None, None) if mask is None else (mask[:2], mask[2:])
    counted = 1.0 if mask is None else second[:, None, :, None]
    target = heads.exact(*held_out, key_mask=second, **kind) * counted
    for setting in plan.settings:
        errors, each = [], []
        for seed in (5, 6):
            features, options = by_hand(calibration, setting, seed=seed, key_mask=first, **kind)
            out = performers.favor_attention(*held_out, features, key_mask=second, **options)
            errors.append(heads.relative(out * counted, target))
            each.append(heads.relative(*((x * counted).flatten(0, 1) for x in (out, target))))
        errors = torch.cat(errors)
        assert setting.error == pytest.approx(float(errors.mean()), rel=1e-4)
        assert setting.error_sd == pytest.approx(float(errors.std()), rel=1e-3, abs=1e-6)
        each = torch.stack(each).view(-1, 2).mean(0).tolist()
        assert setting.head_errors == pytest.approx(each, rel=1e-4)


def test_built_features_are_calibrated_on_all_rows():
    samples = heads.structured(batch=4, length=64)
    plan = performers.plan(*samples, scale=0.3, seed=7, **GRID)
    setting = plan.settings[-1]
    assert (setting.estimator, setting.window, setting.listed_keys) == ("data_aware", 8, 16)
    (features, options), (same, expected) = (
        plan.build(setting), by_hand(samples, setting, seed=7, scale=0.3),
    )  # fmt: skip
    torch.testing.assert_close(features.state_dict(), same.state_dict())
    centers = [x.pop("listed_keys").centers for x in (options, expected)]
    torch.testing.assert_close(*centers)
    assert options == expected


def test_exact_terms_that_cover_everything():
    """Nothing is left to fit features to."""
    samples = heads.structured(batch=2, length=40)
    options = {**GRID, "windows": (None, 64), "sinks": (0, 100), "listed_keys": (0, 64)}
    plan = performers.plan(*samples, target_error=1e-4, **options)
    assert plan.met
    for setting in plan.settings:
        assert (setting.error < 1e-4) == setting.has_exact_pairs
    features, options = plan.build()
    out = performers.favor_attention(*samples, features, **options)
    assert float(heads.relative(out, heads.exact(*samples)).max()) < 1e-4


def test_a_plan_is_the_same_twice_up_to_times():
    """And leaves global randomness and inputs alone."""
    samples = heads.structured(batch=2, length=48)
    copies, random = [x.clone() for x in samples], torch.get_rng_state()
    samples[0].requires_grad_()
    plans = [performers.plan(*samples, seed=seed, **FEW) for seed in (3, 3, 4)]
    first, second, other = ([s.error for s in plan.settings] for plan in plans)
    assert first == second != other
    assert plans[0].diagnosis == plans[1].diagnosis
    value = torch.randn(samples[1].shape, generator=torch.Generator().manual_seed(3))
    first, second = (performers.plan(*samples[:2], x, seed=3, **FEW) for x in (None, value))
    assert [s.error for s in first.settings] == [s.error for s in second.settings]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, y) for x, y in zip(samples, copies, strict=True))


@pytest.mark.parametrize(
    ("queries", "options", "dtype", "within"),
    [
        # Rounded to eight bits, some queries go into other lists of keys.
        (81, {"is_causal": True}, torch.bfloat16, 0.4),
        (60, {"windows": (None,)}, torch.float64, 0.01),
    ],
)
def test_one_row_and_cross_attention_in_any_dtype(queries, options, dtype, within):
    query, key, value = heads.structured(batch=1, length=81)
    options = {**GRID, "sinks": (1,), **options}
    samples = query[:, :, :queries], key, value
    expected = performers.plan(*samples, **options)
    samples = [x.to(dtype) for x in samples]
    plan = performers.plan(*samples, **options)
    assert (plan.held_out, plan.length) == ((1, queries // 2), queries)
    assert bool(plan.diagnosis.window_shares) == (queries == 81)
    for one, other in zip(plan.settings, expected.settings, strict=True):
        assert one.error == pytest.approx(other.error, rel=within)
    features, call = plan.build()
    assert performers.favor_attention(*samples, features, **call).dtype == dtype
