"""Times several calls in turns."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from performers.benchmark.gate import CASE_ERRORS

# A thread pool keeps its threads spinning for a few milliseconds after its last call; a call this
# long is not disturbed by it.
_SETTLED_SECONDS = 0.25

_Name = TypeVar("_Name")


class Timing(NamedTuple):
    """Seconds that a call takes, over some rounds of so many calls each."""

    median: float
    first_quartile: float
    third_quartile: float
    fastest: float
    rounds: int
    calls: int


def summarize(samples: list[float], calls: int = 1) -> Timing:
    """The `Timing` of the mean seconds of a call in each round."""
    low = high = samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), low, high, min(samples), len(samples), calls)


def interleave(
    calls: Mapping[_Name, Callable[[], object]],
    *,
    repeats: int,
    min_time: float,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[_Name, Timing], dict[_Name, Exception]]:
    """Time calls in rounds, each call once in every round, in an order drawn for the round.

    A machine that slows down during the run then does so for all. Each call warms up first. A call
    that takes less than ``min_time / repeats`` seconds is repeated until its turn is that long.

    Args:
        calls: By name; each finishes its work before it returns.
        repeats: Rounds.
        min_time: Least seconds that each call is timed for, all rounds together.
        seed: Seed of the orders.
        clock: Returns seconds.

    Returns:
        The timings, and the errors of calls that failed.
    """
    errors: dict[_Name, Exception] = {}
    estimates: dict[_Name, float] = {}
    for name, call in calls.items():
        try:
            estimates[name] = _warm_up(call, clock)
        except CASE_ERRORS as error:
            errors[name] = error
    counts = {
        name: max(1, math.ceil(min_time / repeats / max(estimate, 1e-9)))
        for name, estimate in estimates.items()
    }
    samples: dict[_Name, list[float]] = {name: [] for name in estimates}
    order = random.Random(seed)
    with _no_collection():
        for _ in range(repeats):
            gc.collect()
            running = [name for name in samples if name not in errors]
            for name in order.sample(running, len(running)):
                try:
                    samples[name].append(_time(calls[name], counts[name], estimates[name], clock))
                except CASE_ERRORS as error:
                    errors[name] = error
    timings = {
        name: summarize(values, counts[name])
        for name, values in samples.items()
        if name not in errors
    }
    return timings, errors


def _warm_up(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a call; the first, which loads and allocates, counts only when it is long."""
    seconds = math.inf
    for _ in range(2):
        start = clock()
        call()
        seconds = min(seconds, clock() - start)
        if seconds > 1:
            break
    return seconds


def _time(
    call: Callable[[], object], count: int, estimate: float, clock: Callable[[], float]
) -> float:
    if estimate < _SETTLED_SECONDS:
        # The call before has left its threads spinning and its data in the caches.
        call()
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, which on a GPU waits for what it has launched."""
    if torch.device(device).type == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize(device)

    return run


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the times, and collections between them short."""
    enabled = gc.isenabled()
    gc.disable()
    # Frozen objects are not collected: with large libraries that takes longer than a call.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@contextmanager
def threads_of_torch(number: int | None) -> Iterator[int]:
    """Set torch's number of threads inside the context; None leaves it as it is.

    Yields:
        The number in force.
    """
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
