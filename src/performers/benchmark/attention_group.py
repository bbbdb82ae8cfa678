"""All contestants at one length, in one direction, through the same passes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from performers.benchmark import flops
from performers.benchmark.calls import AttentionCall, Matmuls
from performers.benchmark.checking import check, first_checked
from performers.benchmark.contestants import PERFORMER_PYTORCH, SDPA, Contestant, contestants
from performers.benchmark.floor import Floor
from performers.benchmark.groups import SKIPPED, Entry, Outcome, Predictor, verdict
from performers.benchmark.results import Row, add_ratios, outcome_columns
from performers.benchmark.settings import PASSES
from performers.benchmark.timing import CONTESTANT_ERRORS
from performers.benchmark.workload import Inputs, Workload

if TYPE_CHECKING:
    from performers.benchmark.settings import AttentionSettings

RATIOS = {SDPA: "sdpa_ratio", PERFORMER_PYTORCH: "performer_pytorch_ratio"}
"""Columns of the results: how many times a row's time the named contestant takes."""

MATMULS = "matmuls alone"
"""The row of what stands around every call in a run between matmuls."""


class Gate:
    """Checks each contestant once in each direction, before it is timed for the first time.

    Args:
        workload: What the checks are made on, at a short length.
        backward: Whether gradients are judged as well.
    """

    def __init__(self, workload: Workload, *, backward: bool) -> None:
        self._workload = workload
        self._backward = backward
        self._verdicts: dict[tuple[str, bool], tuple[str, str] | None] = {}

    def verdict(self, contestant: Contestant, is_causal: bool) -> tuple[str, str] | None:
        """Status and reason of a contestant that may not be timed, None for the others."""
        key = (contestant.name, is_causal)
        if key not in self._verdicts:
            self._verdicts[key] = None
            try:
                check(contestant, self._workload, is_causal, self._backward)
            except CONTESTANT_ERRORS as error:
                self._verdicts[key] = verdict(error, contestant.backend is not None)
        return self._verdicts[key]


@dataclass
class Group:
    """One problem.

    Attributes:
        workload: Shapes.
        direction: ``"bidirectional"`` or ``"causal"``.
        passes: ``"forward"`` or ``"forward+backward"``.
        length: Tokens.
    """

    workload: Workload
    direction: str
    passes: str
    length: int

    @property
    def key(self) -> tuple[str, str, int]:
        """The columns that its rows share."""
        return self.direction, self.passes, self.length

    @property
    def is_causal(self) -> bool:
        """Whether tokens see their past only."""
        return self.direction == "causal"

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.passes == PASSES[1]

    @cached_property
    def inputs(self) -> Inputs:
        """What all contestants are run on; made when the first of them needs it."""
        return self.workload.inputs(self.length, requires_grad=self.backward)

    @cached_property
    def matmuls(self) -> Matmuls:
        """The work between calls."""
        return Matmuls(self.workload, self.length)

    def entry(
        self,
        contestant: Contestant,
        settings: "AttentionSettings",
        gate: Gate,
        predictor: Predictor,
    ) -> Entry:
        """How one contestant is measured, or why it is not."""
        stopped = gate.verdict(contestant, self.is_causal)
        if stopped is None and contestant.growth > 1 and self.length > settings.max_exact_length:
            stopped = (SKIPPED, f"longer than max_exact_length ({settings.max_exact_length})")
        if stopped is None:
            name = (contestant.name, self.direction, self.passes)
            reason = predictor.objection(name, self.length, contestant.growth)
            stopped = None if reason is None else (SKIPPED, reason)
        probe = None
        if settings.memory and self.length <= settings.memory_max_length:
            probe = {
                "kind": "attention",
                "workload": asdict(self.workload),
                "contestant": contestant.name,
                "length": self.length,
                "is_causal": self.is_causal,
                "backward": self.backward,
            }

        def prepare() -> Callable[[], object]:
            attend = contestant.build(self.workload, self.is_causal)
            between = self.matmuls if settings.between_matmuls else None
            return first_checked(
                AttentionCall(attend, self.inputs, backward=self.backward, between=between)
            )

        ours = contestant.backend is not None
        return Entry(contestant.name, prepare, probe, ours=ours, stopped=stopped)

    def matmuls_entry(self) -> Entry:
        """The matmuls of a call and nothing between them."""
        times = 3 if self.backward else 2

        def prepare() -> Callable[[], object]:
            matmuls = self.matmuls

            def call() -> None:
                for _ in range(times):
                    matmuls()

            return call

        return Entry(MATMULS, prepare)

    def rows(self, outcomes: dict[str, Outcome], floor: Floor) -> list[Row]:
        """A row for each contestant, with its operations and ratios.

        Args:
            outcomes: Of ``measure_group``.
            floor: What times are compared with.

        Returns:
            The rows.
        """
        alone = outcomes.get(MATMULS)
        matmuls = alone.timing.median if alone is not None and alone.timing is not None else None
        rows = []
        for name, outcome in outcomes.items():
            row: Row = {
                "direction": self.direction,
                "passes": self.passes,
                "length": self.length,
                "contestant": name,
                **outcome_columns(outcome),
            }
            if matmuls is not None:
                _subtract(row, 0.0 if name == MATMULS else matmuls)
            rows.append({**row, **self._operations(name, row["seconds"], floor)})
        add_ratios(rows, "contestant", RATIOS, "seconds")
        return rows

    def _operations(self, name: str, seconds: float | None, floor: Floor) -> Row:
        contestant = contestants().get(name)
        row: Row = dict.fromkeys(("flops", "gflops_per_second", "floor_seconds", "floor_share"))
        if contestant is None or contestant.forward_flops is None:
            return row
        forward = contestant.forward_flops(self.workload, self.length, self.is_causal)
        row["flops"] = flops.of_pass(forward, self.passes)
        row["floor_seconds"] = floor.seconds(row["flops"])
        if seconds is not None and seconds > 0:
            row["gflops_per_second"] = row["flops"] / seconds / 1e9
            row["floor_share"] = row["floor_seconds"] / seconds
        return row


def _subtract(row: Row, seconds: float) -> None:
    """Take the time of what stands around a call off, and keep the whole beside."""
    row["whole_seconds"] = row["seconds"]
    for column in ("seconds", "first_quartile", "third_quartile", "fastest"):
        if row[column] is not None:
            row[column] -= seconds
