"""Callbacks of a training run: redraws, time, memory, progress, stopping on a signal."""

from __future__ import annotations

import ctypes
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import distributed, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from performers.app.progress import duration
from performers.features import FeatureRedrawer

if TYPE_CHECKING:
    from performers.training.trainer import RunTrainer

_FEWEST_BATCHES = 50


class RedrawCallback(TrainerCallback):
    """Redraws random features every ``interval`` optimiser steps.

    A redraw precedes the checkpoint of its step, which thus contains it.
    """

    def __init__(self, model: nn.Module, interval: int, seed: int) -> None:
        self.redrawer = FeatureRedrawer(model, interval, seed=seed)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Redraw when due, except after the last step."""
        if state.global_step < state.max_steps:
            self.redrawer.step(state.global_step)


class ClockCallback(TrainerCallback, ExportableState):
    """Seconds of training over all parts of a resumed run, saved in the checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time since the last step."""
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now

    def state(self) -> dict[str, Any]:
        """State that Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    @classmethod
    def seconds_at(cls, checkpoint: Path) -> float:
        """Seconds recorded in a checkpoint; 0 if none are."""
        written = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        callbacks = written.get("stateful_callbacks", {})
        return float(callbacks.get(cls.__name__, {}).get("attributes", {}).get("seconds", 0.0))


class TimeLimitCallback(ClockCallback):
    """Ends a run after so many seconds of processor time, with a checkpoint.

    Counted is the time of all threads of the process within steps, without loading, validations and
    checkpoints, over all parts of a resumed run. Of several processes the slowest decides. After
    each tenth of the limit the run saves a checkpoint and validates, if it is to.
    """

    def __init__(self, limit: float, *, saves: bool, validates: bool) -> None:
        super().__init__()
        self.limit, self.saves, self.validates = limit, saves, validates

    @property
    def share(self) -> float:
        """Share of the limit that is spent."""
        return self.seconds / self.limit

    @property
    def reached(self) -> bool:
        """True once the limit is spent."""
        return self.seconds >= self.limit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count nothing before the first step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time of the step, save and validate after a tenth, and stop at the limit."""
        tenths = int(10 * self.share)
        self.seconds += time.process_time() - self._last
        if args.world_size > 1:
            slowest = torch.tensor([self.seconds], dtype=torch.float32, device=args.device)
            distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
            self.seconds = slowest.item()
        if int(10 * self.share) > tenths:
            control.should_save = control.should_save or self.saves
            control.should_evaluate = control.should_evaluate or self.validates
        if self.reached:
            control.should_save = True
            control.should_training_stop = True


class EstimateCallback(TrainerCallback):
    """Announces how long a run takes, from the time of its first batch.

    The batch is run twice, forward and backward, and timed the second time. Gradients and random
    states are as before afterwards, so the run's numbers do not depend on it. Short runs, and runs
    of several processes, are not announced.
    """

    def __init__(self, trainer: RunTrainer, announce: Callable[[str], None]) -> None:
        self.trainer, self.announce = trainer, announce

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time a batch."""
        steps = state.max_steps - state.global_step
        batches = steps * args.gradient_accumulation_steps
        if args.world_size > 1 or batches < _FEWEST_BATCHES:
            return
        seconds = self._seconds()
        self.announce(
            f"about {duration(batches * seconds)} for {steps:,} steps, at {seconds:.2g} s a batch; "
            "validations and checkpoints come on top"
        )

    def _seconds(self) -> float:
        model: Any = self.trainer.model
        accelerator = self.trainer.accelerator
        batch = self.trainer.first_batch()
        inputs = {name: value.to(accelerator.device) for name, value in batch.items()}
        # fork_rng restores the states of CUDA devices too.
        with torch.random.fork_rng(), self.trainer.compute_loss_context_manager():
            for _ in range(2):
                begun = time.perf_counter()
                with accelerator.autocast():
                    loss = self.trainer.compute_loss(model, inputs)
                loss.backward()
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
        model.zero_grad(set_to_none=True)
        return seconds


class TrimCallback(TrainerCallback):
    """Returns free memory to the system when the process has much more than a step needs.

    Varying batch shapes fragment glibc's heap: the process of a small model grew to 7 GB where a
    step needs 1. The need of a step is the largest growth in the first step after a trim; above
    twice that over the level after the trim, free pages are returned (``malloc_trim``), which takes
    some tenths of a second; ``slack`` bytes beyond that are tolerated. Without ``malloc_trim`` in
    the C library nothing is done.
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
        size = anonymous_bytes()
        if self._floor is None:
            # The first step also allocates what stays, such as the state of the optimizer.
            self._floor = size
        elif self._trimmed:
            self._need, self._trimmed = max(self._need, size - self._floor), False
        elif size - self._floor > 2 * self._need + self.slack:
            self.trim()
            self._floor, self._trimmed = anonymous_bytes(), True


def anonymous_bytes() -> int:
    """Anonymous memory of this process in bytes; 0 where the system does not tell."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", memory.rss))


def _heap_trim() -> Callable[[], object] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return lambda: trim(ctypes.c_size_t(0))


class IntervalsCallback(TrainerCallback):
    """Takes the intervals of logs, validations and checkpoints from the arguments.

    A resumed run would otherwise keep those of its checkpoint.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the intervals."""
        state.compute_steps(args, state.max_steps)


class ProgressCallback(TrainerCallback):
    """Reports steps and log entries; with a limit, of as many steps as it will leave time for."""

    def __init__(
        self,
        report: Callable[[int, int, dict[str, float]], None],
        limit: TimeLimitCallback | None = None,
    ) -> None:
        self.report, self.limit = report, limit

    def on_step_end(
        self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Report the step, and a log entry."""
        if not state.is_world_process_zero:
            return
        total = state.max_steps
        if self.limit is not None and self.limit.share:
            total = min(total, round(state.global_step / min(1, self.limit.share)))
        self.report(state.global_step, total, dict(logs or {}))

    on_train_begin = on_log = on_step_end


class StopCallback(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, once ``requested`` is set.

    A request in one of several processes ends all of them after the same step.
    """

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if requested."""
        if args.world_size > 1:
            requests = torch.tensor([int(self.requested)], device=args.device)
            distributed.all_reduce(requests)
            self.requested = bool(requests.item())
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        elif self.requested:
            # The run is complete.
            self.requested = False


@contextmanager
def stop_on_signals(stop: StopCallback) -> Iterator[None]:
    """Turn the first Ctrl-C (or SIGTERM) into an orderly stop; the second one interrupts at once.

    Does nothing outside the main thread, where signals cannot be caught.
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
            # Not one that was set inside.
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
