"""One group of contestants on one problem: memory of each alone, then times in turns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from performers.benchmark.checking import WrongResultError
from performers.benchmark.memory import (
    OUT_OF_MEMORY,
    Peak,
    ProbeError,
    is_out_of_memory,
    limited_memory,
    memory_is_measurable,
    run_probe,
)
from performers.benchmark.settings import Rounds
from performers.benchmark.timing import CONTESTANT_ERRORS, Timing, interleave

MEASURED, SKIPPED, FAILED, ERROR = "measured", "skipped", "failed", "error"
STATUSES = (MEASURED, SKIPPED, OUT_OF_MEMORY, FAILED, ERROR)
"""``failed``: an error or a wrong result of ours; ``error``: of others. The rest speak plainly."""


@dataclass(frozen=True)
class Entry:
    """One contestant of a group.

    Attributes:
        name: What tables call it.
        prepare: Makes the call that is timed; runs after memory was measured.
        probe: The task of ``performers.benchmark.probe``, or None to leave memory out.
        ours: Whether an error is a failure of this package.
        stopped: Status and reason, when it is not to be measured.
    """

    name: str
    prepare: Callable[[], Callable[[], object]]
    probe: Mapping[str, Any] | None = None
    ours: bool = False
    stopped: tuple[str, str] | None = None


@dataclass
class Outcome:
    """What became of a contestant.

    Attributes:
        status: One of ``STATUSES``.
        reason: Why it was not timed; None when it was.
        timing: Its times, or None.
        peak: Its memory, or None.
    """

    status: str = MEASURED
    reason: str | None = None
    timing: Timing | None = None
    peak: Peak | None = None

    def stop(self, status: str, reason: str) -> None:
        """Leave it out of what follows."""
        self.status, self.reason = status, " ".join(reason.split())[:300]


@dataclass
class Predictor:
    """Predicts seconds from a shorter length, so that no call takes an afternoon.

    Attributes:
        max_seconds: The longest call wanted.
        known: Per contestant, the longest length measured so far and its seconds.
    """

    max_seconds: float
    known: dict[Any, tuple[int, float]] = field(default_factory=dict)

    def learn(self, key: Any, length: int, seconds: float) -> None:
        """Remember what a length took."""
        self.known[key] = (length, seconds)

    def objection(self, key: Any, length: int, growth: int) -> str | None:
        """Why a longer one should be skipped, or None."""
        if key not in self.known:
            return None
        shorter, seconds = self.known[key]
        predicted = seconds * (length / shorter) ** growth
        if predicted <= self.max_seconds:
            return None
        return f"a call is predicted to take {predicted:.0f} s, more than {self.max_seconds:g} s"


def measure_group(
    entries: list[Entry],
    rounds: Rounds,
    *,
    threads: int,
    seed: int = 0,
) -> dict[str, Outcome]:
    """Measure contestants on one problem.

    Args:
        entries: The contestants.
        rounds: How often.
        threads: Threads of torch in the processes that measure memory.
        seed: Of the order of rounds.

    Returns:
        By name, what became of each, in the order of the entries.
    """
    outcomes = {entry.name: Outcome() for entry in entries}
    for entry in entries:
        outcome = outcomes[entry.name]
        if entry.stopped is not None:
            outcome.stop(*entry.stopped)
        elif entry.probe is not None and memory_is_measurable():
            try:
                outcome.peak = run_probe(entry.probe, threads=threads)
            except ProbeError as error:
                outcome.stop(*verdict(error, entry.ours))
    with limited_memory():
        calls = {}
        for entry in entries:
            if outcomes[entry.name].status == MEASURED:
                try:
                    calls[entry.name] = entry.prepare()
                except CONTESTANT_ERRORS as error:
                    outcomes[entry.name].stop(*verdict(error, entry.ours))
        timings, errors = interleave(
            calls, repeats=rounds.repeats, min_time=rounds.min_time, seed=seed
        )
    for entry in entries:
        if entry.name in errors:
            outcomes[entry.name].stop(*verdict(errors[entry.name], entry.ours))
    for name, timing in timings.items():
        outcomes[name].timing = timing
    return outcomes


def verdict(error: Exception, ours: bool) -> tuple[str, str]:
    """Status and reason of a contestant that raised.

    Args:
        error: What it raised.
        ours: Whether it is of this package.

    Returns:
        A pair for ``Entry.stopped``.
    """
    if is_out_of_memory(error):
        return OUT_OF_MEMORY, str(error)
    if isinstance(error, WrongResultError | ProbeError):
        return FAILED if ours else ERROR, str(error)
    return FAILED if ours else ERROR, f"{type(error).__name__}: {error}"
