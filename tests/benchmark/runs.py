"""Benchmarks small enough for a test."""

import csv
import importlib
import io
from functools import partial
from unittest import mock

from performers.benchmark.case import select
from performers.benchmark.cases.attention import ATTENTION
from performers.benchmark.cases.floor import measure_floor
from performers.benchmark.measure import Results, run
from performers.benchmark.settings import AttentionSettings

# The package re-exports a function of the module's name.
registry = importlib.import_module("performers.attention.backends")

TINY = {
    "heads": 2,
    "head_dim": 8,
    "num_features": 16,
    "repeats": 3,
    "min_time": 0.0,
    "memory": False,
    "lengths": (16, 32),
    "contestants": ("performers torch", "SDPA", "identity"),
}

quick_floor = partial(measure_floor, seconds=0.002)


def run_small(benchmark, settings, earlier=None):
    """Results of a benchmark; ``earlier`` is the JSON of one to resume."""
    results = Results.empty(benchmark.name, settings)
    if earlier is not None:
        results.resume(earlier)
    results.saves = []
    results.saved = lambda results: results.saves.append(len(results.rows))
    with mock.patch("performers.benchmark.cases.attention.measure_floor", quick_floor):
        run(benchmark, settings, results)
    return results


def run_tiny(earlier=None, **changes):
    return run_small(ATTENTION, AttentionSettings(**{**TINY, **changes}), earlier)


def break_backend(monkeypatch, name, change):
    """Let ``change(right, call)`` answer for a backend, ``right`` being the backend itself."""
    right = registry._BACKENDS[name]
    wrong = right._replace(attend=lambda call: change(right.attend, call))
    monkeypatch.setitem(registry._BACKENDS, name, wrong)


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def measured(rows):
    return select(rows, {"status": "measured"})


def failed(rows):
    return select(rows, {"status": "failed"})


def pick(results, **wanted):
    """The one row with these values."""
    (row,) = select(results.rows, wanted)
    return row
