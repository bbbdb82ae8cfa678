"""The whole call: what it returns and prints, and how settings are timed."""

import doctest
import io
import json
import sys
from dataclasses import replace

import pytest
import torch

import performers
from performers.planning import Plan, measuring, planner
from performers.planning.table import number

from . import heads

GRID = {
    "num_features": (16, 64),
    "windows": (None, 8),
    "sinks": (0, 1),
    "listed_keys": (0, 16),
    "num_draws": 1,
    "backend": "torch",
}


@pytest.fixture(scope="module")
def found() -> Plan:
    samples = heads.structured(batch=3, heads=4, key_heads=2, length=64)
    return performers.plan(*samples, is_causal=True, length=100, show=False, **GRID)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(planner).failed == 0


def test_what_a_plan_holds(found):
    assert len(found.settings) == 32
    assert found.length == 100
    assert found.sample_shape == (3, 4, 2, 64, 16)
    assert found.held_out == (1, 64)
    assert found.recommended in found.front
    assert set(found.front) <= set(found.settings)
    assert all(setting.timed for setting in found.front)
    seconds, errors = zip(*((s.seconds, s.error) for s in found.front), strict=True)
    assert list(seconds) == sorted(seconds)
    assert list(errors) == sorted(errors, reverse=True)
    for setting in found.settings:
        assert setting.seconds > 0
        assert setting.ratio == pytest.approx(setting.seconds / found.exact_seconds)
        assert len(setting.head_errors) == 4
        assert setting.error_sd is None
        dominating = [
            s for s in found.front if s.error <= setting.error and s.seconds <= setting.seconds
        ]
        assert dominating or not setting.timed


def test_every_setting_can_be_built(found):
    samples = heads.structured(batch=2, heads=4, key_heads=2, length=30, seed=8)
    target = heads.exact(*samples, is_causal=True)
    for setting in found.settings:
        features, options = found.build(setting)
        assert options["is_causal"] is True
        assert (options["listed_keys"] is None) == (setting.listed_keys == 0)
        out = performers.favor_attention(*samples, features, **options)
        assert float(heads.relative(out, target).max()) < 3


def test_json(found):
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [setting["error"] for setting in plain["settings"]] == [s.error for s in found.settings]
    assert plain["recommended"]["seconds"] == found.recommended.seconds
    assert plain["diagnosis"]["window_shares"]["8"] == found.diagnosis.window_shares[8]
    assert plain["diagnosis"]["variances"][0]["estimator"] == "positive"
    assert plain["held_out"] == [1, 64]
    assert "samples" not in plain


def table_of(text):
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["estimator"])
    return lines[start + 1 : lines.index("", start)]


@pytest.mark.parametrize("every", [False, True])
def test_the_table(found, every):
    text = found.table() if every else str(found)
    assert max(len(line) for line in text.splitlines()) <= 100
    rows = table_of(text)
    assert rows[0].startswith("->")
    assert rows[-1].split()[0] == "exact"
    marked = [row for row in rows if row.startswith((" *", "->"))]
    assert len(marked) == len(found.front)
    assert (len(rows) == 33) is every
    assert ("more settings in plan.settings" in text.replace("\n", " ")) is not every
    assert f"{found.recommended.error:.3f}" in rows[0]


def test_the_widest_table_fits(found):
    wide = heads.setting(
        12.345,
        98.7654,
        estimator="hyperbolic",
        projection="orthogonal",
        heads="query",
        num_features=16384,
        window=16384,
        sinks=1000,
        listed_keys=1024,
        error_sd=10.123,
        ratio=9876.5,
        multiply_adds=123_456_789.0,
    )
    one = replace(found, settings=(wide,), front=(wide,), recommended=wide)
    assert max(len(line) for line in str(one).splitlines()) <= 100


def test_a_missed_target_is_said_aloud(found):
    samples = heads.structured(batch=2, length=48)
    grid = {**GRID, "num_features": (16,), "windows": (None,)}
    missed = performers.plan(*samples, target_error=1e-3, show=False, **grid)
    assert not missed.met
    assert missed.recommended.error == min(s.error for s in missed.front)
    assert "NOTHING reaches an error of 0.001" in str(missed).replace("\n", " ")
    late = performers.plan(*samples, target_time=1e-9, show=False, **grid)
    assert not late.met
    assert late.recommended == late.front[0]
    assert "NOTHING is within" in str(late).replace("\n", " ")
    assert found.met
    assert "NOTHING" not in str(found)


def test_where_exact_attention_is_faster_the_plan_says_so(found):
    slow = replace(found.recommended, ratio=12.5, seconds=0.0125)
    text = str(replace(found, recommended=slow, exact_seconds=1e-3, length=512))
    text = text.replace("\n", " ")
    assert "prefer it here" in text
    assert "from about 6,400 positions on" in text
    fast = replace(slow, ratio=0.25)
    text = str(replace(found, recommended=fast, exact_seconds=0.05)).replace("\n", " ")
    assert "prefer it here" not in text
    assert "50.0 ms, 4 times as long" in text


def test_show(capsys):
    samples = heads.structured(batch=2, length=24)
    grid = {**GRID, "num_features": (16,), "windows": (None,), "listed_keys": (0,)}
    shown = performers.plan(*samples, **grid)
    captured = capsys.readouterr()
    assert captured.out == f"{shown}\n"
    assert captured.err == ""
    performers.plan(*samples, show=False, **grid)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals_and_leaves_nothing_behind(monkeypatch):
    samples = heads.structured(batch=2, length=24)
    grid = {**GRID, "num_features": (16,), "windows": (None,), "listed_keys": (0,)}
    monkeypatch.setattr("performers.planning.progress._PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("performers.planning.progress._INTERVAL_SECONDS", -1.0)
    for show in (False, True):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        performers.plan(*samples, show=show, **grid)
        written = terminal.getvalue()
        assert bool(written) is show
    assert "plan: errors 4/4" in written
    assert "plan: times" in written
    last, before = written.split("\r")[-2], written.split("\r")[-3]
    assert last == " " * len(before)
    assert written.endswith("\r")


def errors(mean, seconds):
    return measuring.Errors(torch.tensor([mean]), torch.tensor([[mean]]), seconds)


def test_settings_that_others_clearly_beat_are_not_timed_again(monkeypatch):
    """Seconds by a clock that knows how long each setting takes: twice as long as it took first."""
    samples = planner.checked_samples(
        *heads.structured(batch=1, length=16), is_causal=False, key_mask=None, scale=None, seed=0
    )
    first = [errors(0.5, 1.0), errors(0.4, 4.0), errors(0.6, 1.5), errors(0.6, 2.5)]
    first.append(errors(0.4, 30.0))
    calls = []
    monkeypatch.setattr(measuring, "attend", lambda setting, *_: lambda: calls.append(setting))
    monkeypatch.setattr(measuring, "fused_attention", lambda _: lambda: calls.append("fused"))

    def timed(call, device):
        call()
        return None, {"fused": 0.25}.get(calls[-1]) or 2 * first[calls[-1]].seconds

    monkeypatch.setattr(measuring, "_timed", timed)
    times, fused = measuring.measure_times(
        range(5), first, samples, None, "torch", planner.Progress(False), 0
    )
    assert fused == 0.25
    assert times == [(2.0, True), (8.0, True), (3.0, True), (5.0, False), (60.0, False)]
    # One call to warm up, and one a round.
    assert [calls.count(index) for index in range(5)] == [4, 4, 4, 0, 0]


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.01234, "0.0123"), (1.234, "1.23"), (45.67, "45.7"), (1234.5, "1,234"), (0, "0")],
)
def test_numbers(x, text):
    assert number(x) == text


def test_one_row():
    samples = heads.structured(batch=1, length=81)
    found = performers.plan(*samples, is_causal=True, show=False, **GRID)
    assert found.held_out == (1, 40)
    assert found.length == 81
    features, options = found.build()
    assert performers.favor_attention(*samples, features, **options).shape == samples[0].shape


def test_cross_attention():
    query, key, value = heads.structured(batch=2, length=40)
    grid = {**GRID, "windows": (None,)}
    found = performers.plan(query[:, :, :24], key, value, show=False, **grid)
    assert found.diagnosis.window_shares == {}
    assert len(found.settings) == 16
    assert found.length == 24


# Rounded to eight bits, some queries go into other listed_keys.
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 0.01), (torch.bfloat16, 0.4)])
def test_dtypes(dtype, within):
    samples = heads.structured(batch=2, length=40)
    grid = {**GRID, "num_features": (16,)}
    wanted = performers.plan(*samples, show=False, **grid)
    found = performers.plan(*(x.to(dtype) for x in samples), show=False, **grid)
    for one, other in zip(found.settings, wanted.settings, strict=True):
        assert one.error == pytest.approx(other.error, rel=within)
    features, options = found.build()
    out = performers.favor_attention(*(x.to(dtype) for x in samples), features, **options)
    assert out.dtype == dtype


def test_more_sinks_and_lists_than_keys():
    samples = heads.structured(batch=2, length=6)
    found = performers.plan(
        *samples,
        num_features=(16,),
        windows=(None, 3),
        sinks=(0, 4, 100),
        listed_keys=(0, 64),
        num_draws=1,
        backend="torch",
        show=False,
    )
    for setting in found.settings:
        if setting.sinks == 100 or setting.listed_keys:
            assert setting.error < 1e-4
