"""Measures groups of cases: gate, memory of each alone, times in turns, rows."""

from __future__ import annotations

import csv
import io
import json
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
    ProbeError,
    is_out_of_memory,
    limited_memory,
    memory_is_measurable,
    run_apart,
)
from performers.benchmark.settings import Rounds, Sampling
from performers.benchmark.timing import interleave, threads_of_torch

_SAME_MACHINE = ("cpu", "cores", "threads", "torch", "performers", "native")
_TIMES = ("seconds", "first_quartile", "third_quartile", "fastest")


class OtherRunError(Exception):
    """Results on disk were measured with other settings, another version or another machine."""


@dataclass
class Results:
    """The rows of a benchmark or study, and the settings and machine they were measured with.

    ``notes`` has more that belongs to the whole run, such as the floor; ``saved`` is called after
    every group of rows. A resumed run must share the settings named by ``decisive``.
    """

    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    saved: Callable[[Results], None] = lambda results: None
    decisive: Iterable[str] = ()

    @classmethod
    def empty(cls, benchmark: str, settings: Any) -> Results:
        """Results without rows, of `Options` with a field ``threads``."""
        machine = describe(settings.threads or torch.get_num_threads())
        # As they come back from a file: lists for tuples.
        plain = json.loads(json.dumps(asdict(settings)))
        return cls(benchmark, plain, machine, decisive=settings.decisive())

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
            ("settings", self.settings, self.decisive),
            ("machine", self.machine, _SAME_MACHINE),
        ):
            earlier = content.get(part, {})
            for name in names:
                was, now = earlier.get(name), here.get(name)
                if was != now:
                    raise OtherRunError(f"they were measured with {name} {was!r}, this is {now!r}")
        self.rows = list(content.get("rows", []))

    def content(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "benchmark": self.benchmark,
            "settings": self.settings,
            "machine": self.machine,
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
        shorter: list[Row] = []
        for number in range(len(groups)):
            # Not kept in the list, which would keep its tensors.
            group = groups.pop(0)
            if not results.holds(group.key, [case.columns for case in group.cases]):
                rows = measure_group(
                    group,
                    settings,
                    threads=threads,
                    seed=settings.seed + number,
                    shorter=shorter,
                )
                add_ratios([*results.rows, *rows], benchmark.ratios)
                results.put(group.key, rows)
            shorter += select(results.rows, group.key)
            done += len(group.cases)
            progress(done, total)


def measure_group(
    group: Group,
    rounds: Rounds,
    *,
    threads: int,
    seed: int = 0,
    shorter: Iterable[Row] = (),
) -> list[Row]:
    """Measure cases on one problem; returns a row for each.

    Args:
        group: The cases.
        rounds: Repetitions; peak memory has columns if these are a `Sampling`.
        threads: Threads of torch in the processes that measure memory.
        seed: Seed of the order of turns.
        shorter: Rows measured before; times are predicted from those of the same case.
    """
    rows: list[Row] = []
    for case in group.cases:
        row: Row = {**group.key, **case.columns, "status": MEASURED, "reason": None}
        row |= dict.fromkeys((*_TIMES, "rounds", "calls"))
        measures_memory = False
        if isinstance(rounds, Sampling):
            row |= {"peak_bytes": None, "peak_method": None}
            measures_memory = memory_is_measurable() and rounds.measures_memory(row["length"])
        rows.append(row)
        error = case.gate.error if case.gate else None
        if error is not None:
            _stop(row, *verdict(error, case.ours))
        elif reason := case.skip or _too_long(row, group, case, shorter, rounds.max_seconds):
            _stop(row, SKIPPED, reason)
        elif case.probe is not None and measures_memory:
            try:
                peak = run_apart(case.probe, threads=threads)
                row |= {"peak_bytes": peak.nbytes, "peak_method": peak.method}
            except ProbeError as problem:
                _stop(row, *verdict(problem, case.ours))
    _time(group.cases, rows, rounds, seed)
    group.finish(rows)
    return rows


def _too_long(
    row: Row, group: Group, case: Case, shorter: Iterable[Row], max_seconds: float
) -> str | None:
    """The reason to skip a case whose time, predicted from a shorter length, exceeds a limit."""
    if not case.growth:
        return None
    same = {name: row[name] for name in {*group.key, *case.columns} - {"length"}}
    known = select(shorter, {**same, "status": MEASURED})
    if not known:
        return None
    last = known[-1]
    predicted = last["seconds"] * (row["length"] / last["length"]) ** case.growth
    if predicted <= max_seconds:
        return None
    return f"a call is predicted to take {predicted:.0f} s, more than {max_seconds:g} s"


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
