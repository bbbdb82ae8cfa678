"""Freed memory goes back to the system when more is held than a step needs."""

import gc
from types import SimpleNamespace

import pytest
import torch

from performers.proteins.training.train import train_model
from performers.training import callbacks
from performers.training.callbacks import TrimCallback, anonymous_bytes
from tests.proteins.runs import proteins, small_options


def trims(monkeypatch, callback, values):
    """The steps (from 1) at whose end the callback trims, the memory held being as given."""
    held = iter(values)
    trimmed = []
    step = SimpleNamespace(number=0)
    monkeypatch.setattr(callbacks, "anonymous_bytes", lambda: next(held))
    callback.trim = lambda: trimmed.append(step.number)
    while True:
        step.number += 1
        try:
            callback.on_step_end(None, None, None)
        except StopIteration:
            return trimmed


def test_memory_is_trimmed_when_it_is_over_twice_a_steps_need(monkeypatch):
    first, after = 100, 120
    # Nothing is known of a step's need at first: 10 of slack are let be.
    values = [first, 110, 111, after]
    # Then a step adds 50: up to 120 + 2 * 50 + 10.
    values += [170, 230, 231, after]
    # A smaller step does not lower the need, a larger one raises it: 120 + 2 * 60 + 10.
    values += [130, 231, after, 180, 250, 251, after]
    assert trims(monkeypatch, TrimCallback(slack=10), values) == [3, 6, 8, 11]


def test_a_step_that_frees_memory_needs_none(monkeypatch):
    values = [100, 111, 100, 90, 110, 111, 100]
    assert trims(monkeypatch, TrimCallback(slack=10), values) == [2, 5]


def test_nothing_happens_without_the_c_library(monkeypatch):
    callback = TrimCallback()
    callback.trim = None
    monkeypatch.setattr(callbacks, "anonymous_bytes", lambda: 1 / 0)
    callback.on_step_end(None, None, None)


def test_training_trims(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        TrimCallback, "on_step_end", lambda self, args, state, control, **_: steps.append(state)
    )
    train_model(proteins(), tmp_path, small_options(steps=2))
    assert len(steps) == 2


@pytest.mark.skipif(TrimCallback().trim is None, reason="the C library has no malloc_trim")
def test_a_heap_in_pieces_is_handed_back():
    gc.collect()
    # Pieces below the size that is mapped by itself, every second of them freed.
    pieces = [torch.ones(120_000, dtype=torch.uint8) for _ in range(1000)]
    full = anonymous_bytes()
    del pieces[::2]
    TrimCallback().trim()
    assert full - anonymous_bytes() > 500 * 120_000 / 4
