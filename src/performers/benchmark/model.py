"""Time and memory of training steps of the paper's models against length."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from performers.benchmark.groups import (
    MEASURED,
    SKIPPED,
    Entry,
    Outcome,
    Predictor,
    measure_group,
    verdict,
)
from performers.benchmark.machine import describe
from performers.benchmark.results import Results, Row, add_ratios, outcome_columns, ratio
from performers.benchmark.settings import ModelSettings
from performers.benchmark.steps import Shape, TrainingStep, check_model
from performers.benchmark.threads import threads_of_torch
from performers.benchmark.timing import CONTESTANT_ERRORS

GROUP_KEYS, MEMBER_KEYS = ("size", "objective", "length"), ("attention",)
IDENTITY, EXACT = "identity", "exact"


def model_results(settings: ModelSettings) -> Results:
    """The empty results of a run, to be filled by ``run_model``."""
    threads = settings.threads or torch.get_num_threads()
    return Results("model", GROUP_KEYS, MEMBER_KEYS, asdict(settings), describe(threads))


def run_model(
    settings: ModelSettings,
    results: Results,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure, length by length, into results that may hold some already.

    Args:
        settings: What to measure.
        results: Of ``model_results``.
        progress: Called with how many models of how many are done.
    """
    shape = settings.shape()
    predictor = Predictor(settings.max_seconds)
    width = len(settings.attentions)
    with threads_of_torch(settings.threads) as threads:
        gate: dict[str, tuple[str, str] | None] = {}
        for number, length in enumerate(settings.lengths):
            group = (shape.size, shape.objective, length)
            if not results.has_group(group, [(name,) for name in settings.attentions]):
                gate = gate or {name: _verdict(shape, name) for name in settings.attentions}
                entries = [
                    _entry(name, length, settings, gate[name], predictor)
                    for name in settings.attentions
                ]
                outcomes = measure_group(entries, settings, threads=threads, seed=number)
                results.put_group(group, _rows(group, outcomes))
            for row in results.group(group):
                if row["status"] == MEASURED:
                    predictor.learn(row["attention"], length, row["seconds"])
            progress((number + 1) * width, len(settings.lengths) * width)


def _verdict(shape: Shape, attention: str) -> tuple[str, str] | None:
    try:
        check_model(shape, attention)
    except CONTESTANT_ERRORS as error:
        return verdict(error, ours=True)
    return None


def _entry(
    attention: str,
    length: int,
    settings: ModelSettings,
    stopped: tuple[str, str] | None,
    predictor: Predictor,
) -> Entry:
    shape = settings.shape()
    exact = attention == EXACT
    if stopped is None and exact and length > settings.max_exact_length:
        stopped = (SKIPPED, f"longer than max_exact_length ({settings.max_exact_length})")
    if stopped is None:
        # The linear part of the model dominates at first, so this is on the safe side.
        reason = predictor.objection(attention, length, 2 if exact else 1)
        stopped = None if reason is None else (SKIPPED, reason)
    probe = None
    if settings.memory and length <= settings.memory_max_length:
        model = asdict(shape)
        probe = {"kind": "step", "model": model, "attention": attention, "length": length}
    return Entry(
        attention,
        lambda: TrainingStep(shape, attention, length),
        probe,
        ours=True,
        stopped=stopped,
    )


def _rows(group: tuple[str, str, int], outcomes: dict[str, Outcome]) -> list[Row]:
    rows: list[Row] = [
        {
            **dict(zip(GROUP_KEYS, group, strict=True)),
            "attention": name,
            **outcome_columns(outcome),
        }
        for name, outcome in outcomes.items()
    ]
    identity = next((row for row in rows if row["attention"] == IDENTITY), None)
    for row in rows:
        for column, ratio_column in (
            ("seconds", "over_identity"),
            ("peak_bytes", "memory_over_identity"),
        ):
            row[ratio_column] = None if identity is None else ratio(row[column], identity[column])
    add_ratios(rows, "attention", {EXACT: "exact_ratio"}, "seconds")
    return rows
