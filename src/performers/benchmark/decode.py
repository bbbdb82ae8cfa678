"""Time per token and bytes of state against the length of the context."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from performers import backends
from performers.benchmark.decode_states import (
    EXACT,
    Decoder,
    ExactDecoder,
    FavorDecoder,
    ModelDecoder,
    check_decoder,
)
from performers.benchmark.groups import Entry, Outcome, measure_group, verdict
from performers.benchmark.machine import describe
from performers.benchmark.results import Results, Row, outcome_columns, ratio
from performers.benchmark.settings import DecodeSettings
from performers.benchmark.steps import Shape
from performers.benchmark.threads import threads_of_torch
from performers.benchmark.timing import CONTESTANT_ERRORS
from performers.benchmark.workload import Workload

GROUP_KEYS, MEMBER_KEYS = ("level",), ("context", "contestant")
LAYER, MODEL = "layer", "model"
MODEL_CONTESTANTS = ("favor-softmax", "exact")


def decode_results(settings: DecodeSettings) -> Results:
    """The empty results of a run, to be filled by ``run_decode``."""
    threads = settings.threads or torch.get_num_threads()
    return Results("decode", GROUP_KEYS, MEMBER_KEYS, asdict(settings), describe(threads))


def run_decode(
    settings: DecodeSettings,
    results: Results,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure into results that may hold some already.

    All contexts of one layer are timed in turns, like contestants, because it is their ratio that
    matters. Of models only one of a kind fits in memory: they go from context to context.

    Args:
        settings: What to measure.
        results: Of ``decode_results``.
        progress: Called with how many contexts of how many are done.
    """
    every = settings.contexts
    plan = [(LAYER, _layers(settings.workload()), [every])]
    if settings.through_model:
        plan.append((MODEL, _models(settings), [(context,) for context in every]))
    done, total = 0, len(plan) * len(every)
    with threads_of_torch(settings.threads) as threads:
        for level, chosen, batches in plan:
            wanted = [(context, one.name) for context in every for one in chosen]
            if results.has_group((level,), wanted):
                done += len(every)
                progress(done, total)
                continue
            verdicts = {one.name: one.verdict(settings.dtype) for one in chosen}
            decoders = Decoders(chosen, shared=level == MODEL)
            rows: list[Row] = []
            for contexts in batches:
                members = {
                    f"{one.name}, {context}": (one.name, context)
                    for context in contexts
                    for one in chosen
                }
                entries = [
                    Entry(
                        entry,
                        decoders.prepare(name, context, settings.tokens),
                        ours=name != EXACT,
                        stopped=verdicts[name],
                    )
                    for entry, (name, context) in members.items()
                ]
                outcomes = measure_group(entries, settings, threads=threads, seed=settings.seed)
                rows += [
                    _row(level, *member, outcomes[entry], settings.tokens, decoders)
                    for entry, member in members.items()
                ]
                _add_ratios(rows)
                results.put_group((level,), rows)
                done += len(contexts)
                progress(done, total)


@dataclass(frozen=True)
class _Contestant:
    name: str
    make: Callable[[], Decoder]
    # The same on the reference backend, for what is ours.
    reference: Callable[[], Decoder] | None = None

    def verdict(self, dtype: str) -> tuple[str, str] | None:
        if self.reference is None:
            return None
        try:
            check_decoder(self.make(), self.reference(), dtype)
        except CONTESTANT_ERRORS as error:
            return verdict(error, ours=True)
        return None


class Decoders:
    """The decoders of a level: one per context, or one that reads on from context to context.

    Args:
        chosen: Who decodes.
        shared: Whether one decoder serves all contexts, in rising order.
    """

    def __init__(self, chosen: list[_Contestant], *, shared: bool) -> None:
        self._make = {one.name: one.make for one in chosen}
        self._shared = shared
        self._kept: dict[str, Decoder] = {}
        self.nbytes: dict[tuple[str, int], int] = {}

    def prepare(self, name: str, context: int, tokens: int) -> Callable[[], Callable[[], object]]:
        """What ``Entry.prepare`` is: reads the context, returns a call that steps on from it."""

        def prepare() -> Callable[[], object]:
            decoder = self._kept.get(name) or self._make[name]()
            if self._shared:
                self._kept[name] = decoder
            decoder.extend(context)
            self.nbytes[name, context] = decoder.nbytes

            def call() -> None:
                decoder.begin(tokens)
                for _ in range(tokens):
                    decoder.step()

            return call

        return prepare


def _layers(workload: Workload) -> list[_Contestant]:
    def favor(name: str) -> _Contestant:
        return _Contestant(
            f"performers {name}",
            lambda: FavorDecoder(workload, name),
            lambda: FavorDecoder(workload, "reference"),
        )

    ours = [favor(name) for name in backends() if name != "reference"]
    return [*ours, _Contestant(EXACT, lambda: ExactDecoder(workload))]


def _models(settings: DecodeSettings) -> list[_Contestant]:
    shape = Shape(batch=settings.batch, num_features=settings.num_features, seed=settings.seed)

    def model(attention: str) -> _Contestant:
        def make() -> Decoder:
            return ModelDecoder(shape, attention)

        return _Contestant(f"model {attention}", make, make if attention != "exact" else None)

    return [model(attention) for attention in MODEL_CONTESTANTS]


def _row(
    level: str, name: str, context: int, outcome: Outcome, tokens: int, decoders: Decoders
) -> Row:
    row = {"level": level, "context": context, "contestant": name, **outcome_columns(outcome)}
    for column in ("seconds", "first_quartile", "third_quartile", "fastest"):
        if row[column] is not None:
            row[column] /= tokens
    del row["peak_bytes"], row["peak_method"]
    row["state_bytes"] = decoders.nbytes.get((name, context))
    return row


def _add_ratios(rows: list[Row]) -> None:
    """To exact attention at the same context, and to the shortest context."""
    exact = {row["context"]: row["seconds"] for row in rows if "exact" in row["contestant"]}
    shortest: dict[str, float | None] = {}
    for row in rows:
        first = shortest.setdefault(row["contestant"], row["seconds"])
        row["over_shortest_context"] = ratio(row["seconds"], first)
        row["exact_ratio"] = ratio(exact.get(row["context"]), row["seconds"])
