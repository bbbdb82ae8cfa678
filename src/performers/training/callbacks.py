"""Callbacks of a training run: redraws, progress, and stopping on a signal."""

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from performers.features import FeatureRedrawer


class RedrawCallback(TrainerCallback):
    """Fresh random features every so many optimiser steps.

    They are drawn before the step's checkpoint is written, so the checkpoint holds them.
    """

    def __init__(self, model: nn.Module, interval: int, seed: int) -> None:
        self.redrawer = FeatureRedrawer(model, interval, seed=seed)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Redraw when due; not after the last step, which leaves the features it trained with."""
        if state.global_step < state.max_steps:
            self.redrawer.step(state.global_step)


class ClockCallback(TrainerCallback, ExportableState):
    """Seconds of training over all parts of a resumed run, kept in the checkpoints.

    Args:
        seconds: What earlier parts took.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now

    def state(self) -> dict[str, Any]:
        """What Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    @classmethod
    def seconds_at(cls, checkpoint: Path) -> float:
        """The count in a checkpoint; 0 if it has none."""
        written = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        callbacks = written.get("stateful_callbacks", {})
        return float(callbacks.get(cls.__name__, {}).get("attributes", {}).get("seconds", 0.0))


class TrimCallback(TrainerCallback):
    """Gives freed memory back to the system when much more is held than a step needs.

    Batches of ever other shapes leave glibc's heap in pieces, none of which is handed back: the
    process of a small model grew to 7 GB where its steps need 1. A step's need is the most that
    the first step after a trim has added; at more than twice that above the level after the trim,
    free pages are returned (``malloc_trim``), which takes some tenths of a second. Does nothing
    where the C library cannot do it.

    Args:
        slack: Bytes beyond twice a step's need that are let be.
    """

    def __init__(self, slack: int = 256 << 20) -> None:
        self.slack = slack
        self.trim = _heap_trim()
        self._floor: int | None = None
        self._need = 0
        self._trimmed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trim when due."""
        if self.trim is None:
            return
        held = anonymous_bytes()
        if self._floor is None:
            # The first step also made what stays: the optimizer's state, pools of threads.
            self._floor = held
        elif self._trimmed:
            self._need, self._trimmed = max(self._need, held - self._floor), False
        elif held - self._floor > 2 * self._need + self.slack:
            self.trim()
            self._floor, self._trimmed = anonymous_bytes(), True


def anonymous_bytes() -> int:
    """Memory that this process holds beside pages of files; 0 where ``/proc`` does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def _heap_trim() -> Callable[[], object] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return lambda: trim(ctypes.c_size_t(0))


class IntervalsCallback(TrainerCallback):
    """Steps between log entries, validations and checkpoints as now asked for.

    A resumed run would otherwise keep those that its checkpoint was written with.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take them from the arguments."""
        state.compute_steps(args, state.max_steps)


class ProgressCallback(TrainerCallback):
    """Reports steps and log entries."""

    def __init__(self, report: Callable[[int, int, dict[str, float]], None]) -> None:
        self.report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report where the run begins."""
        if state.is_world_process_zero:
            self.report(state.global_step, state.max_steps, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        if state.is_world_process_zero:
            self.report(state.global_step, state.max_steps, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report a log entry."""
        if state.is_world_process_zero and logs:
            self.report(state.global_step, state.max_steps, dict(logs))


class StopCallback(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, once ``requested`` is set.

    Of several processes one request ends all, after the same step.
    """

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop when asked to."""
        if args.world_size > 1:
            requests = torch.tensor([int(self.requested)], device=args.device)
            distributed.all_reduce(requests)
            self.requested = bool(requests.item())
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        elif self.requested:
            # The run is complete anyway.
            self.requested = False


@contextmanager
def stop_on_signals(stop: StopCallback) -> Iterator[None]:
    """Turn the first Ctrl-C (or SIGTERM) into an orderly stop; the second one interrupts at once.

    Outside the main thread, where signals cannot be caught, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for name, handler in previous.items():
            signal.signal(name, handler)

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
