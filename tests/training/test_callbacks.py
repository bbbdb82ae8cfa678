"""Freed memory goes back to the system when more is held than a step needs."""

import gc
from functools import partial

import pytest
import torch

from performers.proteins.training.train import train_model
from performers.training import callbacks
from performers.training.callbacks import TrimCallback, anonymous_bytes
from tests.proteins.runs import proteins, small_options

# Nothing is known of a step's need at first: 10 of slack are let be.
GROWTH = [100, 110, 111, 120]
# Then a step adds 50: up to 120 + 2 * 50 + 10.
GROWTH += [170, 230, 231, 120]
# A smaller step does not lower the need, a larger one raises it: 120 + 2 * 60 + 10.
GROWTH += [130, 231, 120, 180, 250, 251, 120]


@pytest.mark.parametrize(
    ("values", "expected"),
    [(GROWTH, [3, 6, 8, 11]), ([100, 111, 100, 90, 110, 111, 100], [2, 5])],
    ids=["growth", "a step that frees memory"],
)
def test_memory_is_trimmed_when_it_is_over_twice_a_steps_need(monkeypatch, values, expected):
    """Values are the memory at the end of each step, and after a trim."""
    held, trimmed = iter(values), []
    monkeypatch.setattr(callbacks, "anonymous_bytes", lambda: next(held))
    callback = TrimCallback(slack=10)
    for step in range(1, len(values) - len(expected) + 1):
        callback.trim = partial(trimmed.append, step)
        callback.on_step_end(None, None, None)
    assert trimmed == expected


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
