"""Time and memory of attention against length."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from performers.benchmark.attention_group import Gate, Group
from performers.benchmark.contestants import contestants
from performers.benchmark.floor import measure_floor
from performers.benchmark.groups import MEASURED, Predictor, measure_group
from performers.benchmark.machine import describe
from performers.benchmark.results import Results
from performers.benchmark.settings import PASSES, AttentionSettings
from performers.benchmark.threads import threads_of_torch

GROUP_KEYS, MEMBER_KEYS = ("direction", "passes", "length"), ("contestant",)


def attention_results(settings: AttentionSettings) -> Results:
    """The empty results of a run, to be filled by ``run_attention``."""
    known = contestants()
    threads = settings.threads or torch.get_num_threads()
    names = settings.contestants or tuple(known)
    absent = {name: reason for name in names if (reason := known[name].absence)}
    return Results(
        "attention",
        GROUP_KEYS,
        MEMBER_KEYS,
        asdict(settings),
        describe(threads),
        {"not_measured": absent},
    )


def run_attention(
    settings: AttentionSettings,
    results: Results,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure, group by group, into results that may hold some groups already.

    Args:
        settings: What to measure.
        results: Of ``attention_results``.
        progress: Called with how many contestants of how many are done.
    """
    workload = settings.workload()
    known = contestants()
    names = settings.contestants or tuple(known)
    chosen = [known[name] for name in names if known[name].absence is None]
    groups = [
        Group(workload, direction, passes, length)
        for direction in settings.directions
        for length in settings.lengths
        for passes in settings.passes
    ]
    predictor = Predictor(settings.max_seconds)
    gate = Gate(workload, backward=PASSES[1] in settings.passes)
    with threads_of_torch(settings.threads) as threads:
        floor = measure_floor(workload.torch_dtype, threads)
        results.notes["floor"] = floor._asdict()
        for number, group in enumerate(groups):
            if not results.has_group(group.key, [(contestant.name,) for contestant in chosen]):
                entries = [group.entry(one, settings, gate, predictor) for one in chosen]
                if settings.between_matmuls:
                    entries.append(group.matmuls_entry())
                outcomes = measure_group(
                    entries, settings, threads=threads, seed=settings.seed + number
                )
                results.put_group(group.key, group.rows(outcomes, floor))
            for row in results.group(group.key):
                if row["status"] == MEASURED:
                    name = (row["contestant"], *group.key[:2])
                    predictor.learn(name, group.length, row["seconds"])
            progress((number + 1) * len(chosen), len(groups) * len(chosen))
