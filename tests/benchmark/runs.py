"""Benchmarks small enough for a test."""

import csv
import importlib
import io
from functools import partial
from unittest import mock

from performers.benchmark.attention import attention_results, run_attention
from performers.benchmark.floor import measure_floor
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


def run_tiny(earlier=None, **changes):
    """Results of a tiny attention benchmark; ``earlier`` is the JSON of one to resume."""
    settings = AttentionSettings(**{**TINY, **changes})
    results = attention_results(settings)
    if earlier is not None:
        results.resume(earlier)
    saves = []
    results.saved = lambda results: saves.append(len(results.rows))
    with mock.patch("performers.benchmark.attention.measure_floor", quick_floor):
        run_attention(settings, results)
    results.saves = saves
    return results


quick_floor = partial(measure_floor, seconds=0.002)


def break_backend(monkeypatch, name, change):
    """Let ``change(right, call)`` answer for a backend, ``right`` being the backend itself."""
    right = registry._BACKENDS[name]
    wrong = right._replace(attend=lambda call: change(right.attend, call))
    monkeypatch.setitem(registry._BACKENDS, name, wrong)


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def pick(results, **wanted):
    """The one row with these values."""
    (row,) = [
        row for row in results.rows if all(row[key] == value for key, value in wanted.items())
    ]
    return row
