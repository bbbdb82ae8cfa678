"""Measures groups of cases: gate, memory of each alone, times in turns, rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from performers.benchmark.case import (
    ERROR,
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    SKIPPED,
    Benchmark,
    Case,
    Group,
    Row,
    add_ratios,
    select,
)
from performers.benchmark.gate import CASE_ERRORS, WrongResultError
from performers.benchmark.machine import describe
from performers.benchmark.memory import (
    Peak,
    ProbeError,
    is_out_of_memory,
    limited_memory,
    memory_is_measurable,
    run_apart,
)
from performers.benchmark.settings import Rounds, Sampling
from performers.benchmark.timing import interleave, threads_of_torch

# Settings that say what is measured, and not how: a resumed run may have others.
EXTENT = frozenset(
    {
        "anisotropic_norms",
        "attentions",
        "contestants",
        "contexts",
        "directions",
        "kernel_feature_counts",
        "layers",
        "lengths",
        "max_exact_length",
        "max_seconds",
        "memory",
        "memory_max_length",
        "norms",
        "passes",
    }
)
_SAME_MACHINE = ("cpu", "cores", "threads", "torch", "performers", "native")
_TIMES = ("seconds", "first_quartile", "third_quartile", "fastest")


class OtherRunError(Exception):
    """Results on disk were measured with other settings, another version or another machine."""


@dataclass
class Results:
    """The rows of a run, and the settings and machine they were measured with.

    Attributes:
        benchmark: ``"attention"``, ``"model"``, ``"decode"``, or the name of a study.
        settings: Settings of the run.
        machine: See ``machine.describe``.
        notes: More that belongs to the whole run, such as the floor.
        rows: The rows.
        saved: Called after every group of rows.
    """

    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    saved: Callable[[Results], None] = lambda results: None

    @classmethod
    def empty(cls, benchmark: str, settings: Any) -> Results:
        """Results without rows, of settings with a field ``threads``."""
        machine = describe(settings.threads or torch.get_num_threads())
        return cls(benchmark, asdict(settings), machine)

    def holds(self, key: Row, cases: Iterable[Row]) -> bool:
        """True where all cases of a group have rows.

        A group is kept or measured again as a whole: its times were taken in turns.
        """
        return all(select(self.rows, {**key, **columns}) for columns in cases)

    def put(self, key: Row, rows: list[Row]) -> None:
        """Add the rows of a group in place of its earlier ones, and save."""
        old = select(self.rows, key)
        self.rows = [row for row in self.rows if row not in old] + rows
        self.saved(self)

    def resume(self, content: Mapping[str, Any]) -> None:
        """Take over the rows of an earlier run.

        Raises:
            OtherRunError: The earlier run differs in settings, version or machine.
        """
        if content.get("benchmark") != self.benchmark:
            raise OtherRunError(
                f"they are of the {content.get('benchmark')!r} benchmark, not {self.benchmark!r}"
            )
        for part, here, names in (
            ("settings", self.settings, [name for name in self.settings if name not in EXTENT]),
            ("machine", self.machine, _SAME_MACHINE),
        ):
            earlier = content.get(part, {})
            for name in names:
                # Through JSON a tuple comes back as a list.
                was, now = _plain(earlier.get(name)), _plain(here.get(name))
                if was != now:
                    raise OtherRunError(f"they were measured with {name} {was!r}, this is {now!r}")
        self.rows = list(content.get("rows", []))

    def content(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "benchmark": self.benchmark,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "machine": dict(self.machine),
            **self.notes,
            "rows": self.rows,
        }

    def csv(self) -> str:
        """The rows as CSV with a header; missing values are empty."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()


@dataclass
class Predictor:
    """Predicts seconds of a call from a shorter length.

    Attributes:
        max_seconds: Longest call allowed.
        across: The column of the length.
        known: The last length measured and its seconds, by case.
    """

    max_seconds: float
    across: str = "length"
    known: dict[Any, tuple[int, float]] = field(default_factory=dict)

    def learn(self, rows: Iterable[Row], group: Group) -> None:
        """Remember the times of a group."""
        for row in rows:
            if row["status"] == MEASURED:
                self.known[self._case(row, group)] = (row[self.across], row["seconds"])

    def objection(self, row: Row, group: Group, growth: int) -> str | None:
        """The reason to skip a case, or None."""
        if not growth or (known := self.known.get(self._case(row, group))) is None:
            return None
        shorter, seconds = known
        predicted = seconds * (row[self.across] / shorter) ** growth
        if predicted <= self.max_seconds:
            return None
        return f"a call is predicted to take {predicted:.0f} s, more than {self.max_seconds:g} s"

    def _case(self, row: Row, group: Group) -> tuple[Any, ...]:
        """All columns that name a case, except the length."""
        names = {*group.key, *group.cases[0].columns} - {self.across}
        return tuple(row[name] for name in sorted(names))


def run(
    benchmark: Benchmark,
    settings: Any,
    results: Results,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure a benchmark, group by group, into results that may hold some groups already."""
    with threads_of_torch(settings.threads) as threads:
        groups = benchmark.groups(settings, results.notes)
        done, total = 0, sum(len(group.cases) for group in groups)
        predictor = Predictor(settings.max_seconds, benchmark.across)
        for number in range(len(groups)):
            # Not kept in the list, which would keep its tensors.
            group = groups.pop(0)
            if not results.holds(group.key, [case.columns for case in group.cases]):
                rows = measure_group(
                    group,
                    settings,
                    threads=threads,
                    seed=settings.seed + number,
                    predictor=predictor,
                )
                add_ratios([*results.rows, *rows], benchmark.ratios)
                results.put(group.key, rows)
            predictor.learn(select(results.rows, group.key), group)
            done += len(group.cases)
            progress(done, total)


def measure_group(
    group: Group,
    rounds: Rounds,
    *,
    threads: int,
    seed: int = 0,
    predictor: Predictor | None = None,
) -> list[Row]:
    """Measure cases on one problem.

    Args:
        group: The cases.
        rounds: Repetitions; peak memory has columns if these are a `Sampling`.
        threads: Threads of torch in the processes that measure memory.
        seed: Seed of the order of rounds.
        predictor: Skips long calls.

    Returns:
        A row for each case.
    """
    rows: list[Row] = []
    for case in group.cases:
        row: Row = {**group.key, **case.columns, "status": MEASURED, "reason": None}
        row |= dict.fromkeys((*_TIMES, "rounds", "calls"))
        if isinstance(rounds, Sampling):
            row |= {"peak_bytes": None, "peak_method": None}
        rows.append(row)
        error = case.gate.error if case.gate else None
        reason = case.skip
        if error is None and reason is None and predictor is not None:
            reason = predictor.objection(row, group, case.growth)
        if error is not None:
            _stop(row, *verdict(error, case.ours))
        elif reason is not None:
            _stop(row, SKIPPED, reason)
        elif case.probe is not None and memory_is_measurable():
            try:
                peak = Peak(*run_apart(case.probe, threads=threads))
                row |= {"peak_bytes": peak.nbytes, "peak_method": peak.method}
            except ProbeError as problem:
                _stop(row, *verdict(problem, case.ours))
    _time(group.cases, rows, rounds, seed)
    group.finish(rows)
    return rows


def _time(cases: list[Case], rows: list[Row], rounds: Rounds, seed: int) -> None:
    """Time the cases that were not stopped, in turns."""
    with limited_memory():
        calls: dict[int, Callable[[], object]] = {}
        errors: dict[int, Exception] = {}
        for number, (case, row) in enumerate(zip(cases, rows, strict=True)):
            if row["status"] == MEASURED:
                try:
                    calls[number] = case.prepare()
                except CASE_ERRORS as problem:
                    errors[number] = problem
        timings, failed = interleave(
            calls, repeats=rounds.repeats, min_time=rounds.min_time, seed=seed
        )
    for number, error in {**errors, **failed}.items():
        _stop(rows[number], *verdict(error, cases[number].ours))
    for number, timing in timings.items():
        rows[number] |= {"rounds": timing.rounds, "calls": timing.calls}
        for name, value in zip(_TIMES, timing[: len(_TIMES)], strict=True):
            rows[number][name] = value / cases[number].units


def _stop(row: Row, status: str, reason: str) -> None:
    row |= {"status": status, "reason": " ".join(reason.split())[:300]}


def verdict(error: Exception, ours: bool) -> tuple[str, str]:
    """Status and reason of a case that raised."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY, str(error)
    told = isinstance(error, WrongResultError | ProbeError)
    reason = str(error) if told else f"{type(error).__name__}: {error}"
    return FAILED if ours else ERROR, reason


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
