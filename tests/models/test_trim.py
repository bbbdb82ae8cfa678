"""Freed memory goes back to the system when more is held than a step needs."""

import sys
from types import SimpleNamespace

import pytest
import torch

from performers.models import callbacks
from performers.models.callbacks import TrimCallback, resident_bytes


def levels(monkeypatch, callback, values):
    """The steps (from 1) at whose end the callback trims, the memory held being as given."""
    held = iter(values)
    trimmed = []
    step = SimpleNamespace(number=0)
    monkeypatch.setattr(callbacks, "resident_bytes", lambda: next(held))
    callback.trim = lambda: trimmed.append(step.number)
    callback.on_train_begin(None, None, None)
    while True:
        step.number += 1
        try:
            callback.on_step_end(None, None, None)
        except StopIteration:
            return trimmed


def test_memory_is_trimmed_when_it_is_over_twice_a_steps_need(monkeypatch):
    # Before: 100; a step adds 50, and up to 210 (and 10 of slack) is let be.
    begin, after = 100, 120
    values = [begin, 150, 200, 210, 211, after, 180, 250, 251, after, 130]
    assert levels(monkeypatch, TrimCallback(slack=10), values) == [4, 7]


def test_a_step_that_frees_memory_needs_none(monkeypatch):
    assert levels(monkeypatch, TrimCallback(slack=10), [100, 90, 110, 111, 100, 100]) == [3]


def test_nothing_happens_without_the_c_library(monkeypatch):
    callback = TrimCallback()
    callback.trim = None
    monkeypatch.setattr(callbacks, "resident_bytes", lambda: 1 / 0)
    callback.on_step_end(None, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_is_that_of_the_process():
    before = resident_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    grown = resident_bytes() - before
    assert 60 << 20 < grown < 80 << 20
    del block


@pytest.mark.skipif(TrimCallback().trim is None, reason="the C library has no malloc_trim")
def test_a_heap_in_pieces_is_handed_back():
    # Pieces below the size that is mapped by itself, every second of them freed.
    pieces = [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(1000)]
    full = resident_bytes()
    del pieces[::2]
    TrimCallback().trim()
    assert full - resident_bytes() > 20 << 20
