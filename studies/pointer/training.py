"""Training and scores of pointer networks, and the time of their encoders."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch

from performers.catalogue import PerformerPointer
from studies.pages import Table
from studies.parts import Part, section
from studies.pointer.tasks import TASKS, Task, draw
from studies.training import descend

ENCODERS = ("favor", "exact")

# Covers every input of the study.
_WINDOW = 1 << 15
# Other draws than those of training.
_SCORED_SEED = 1_000_000


@dataclass(frozen=True)
class Size:
    """Size of the study.

    Attributes:
        steps: Training steps of a model.
        trained: Points of a training input; a tour has ``tour`` of them.
        scored: Points of the scored inputs.
        tour: Points of a tour in training, few enough to know the shortest.
        scored_tours: Likewise of the scored ones.
        timed: Points of the inputs whose encoding is timed.
    """

    steps: int = 2000
    trained: int = 50
    scored: tuple[int, ...] = (50, 200, 1000)
    tour: int = 10
    scored_tours: tuple[int, ...] = (10, 20, 50)
    timed: tuple[int, ...] = (50, 200, 1000, 4000, 16000)
    batch: int = 32
    hidden_size: int = 64
    num_heads: int = 4
    answers: int = 100


QUICK = Size(
    steps=3, trained=6, scored=(6, 9), tour=5, scored_tours=(5, 13), timed=(20, 40), batch=4,
    hidden_size=16, num_heads=2, answers=3,
)  # fmt: skip


def make_model(task: Task, encoder: str, size: Size, seed: int) -> PerformerPointer:
    """Two layers of encoder, one of decoder; the same weights and features for both encoders."""
    torch.manual_seed(seed)
    return PerformerPointer(
        task.input_size,
        hidden_size=size.hidden_size,
        num_heads=size.num_heads,
        encoder_layers=2,
        decoder_layers=1,
        window=_WINDOW if encoder == "exact" else None,
        ends=task.ends,
        generator=torch.Generator().manual_seed(seed),
    )


def train_and_score(name: str, encoder: str, size: Size, seed: int) -> Part:
    """Train one model on inputs drawn anew at each step, and score it at all sizes.

    Returns:
        ``loss`` (mean of the last 50 steps), ``cpu_seconds`` of training and of ``decode`` by
        size, and ``scores`` by size: share of right answers, and the task's measure.
    """
    task = TASKS[name]
    trained, scored = (
        (size.tour, size.scored_tours) if name == "tour" else (size.trained, size.scored)
    )
    model = make_model(task, encoder, size, seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, size.steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    start = time.process_time()
    for _ in range(size.steps):
        points, answer = draw(task, size.batch, trained, generator)
        losses.append(descend(model.loss(points, answer), optimizer, schedule, clip=1.0))
    part: Part = {
        "loss": fmean(losses[-50:]),
        "cpu_seconds": time.process_time() - start,
        "scores": {},
        "decode": {},
    }
    model.eval()
    generator = torch.Generator().manual_seed(_SCORED_SEED)
    for count in scored:
        points, right = draw(task, size.answers, count, generator)
        start = time.process_time()
        answer = model.decode(points)
        part["decode"][str(count)] = (time.process_time() - start) / size.answers
        part["scores"][str(count)] = task.score(points, answer, right)
    return part


@torch.no_grad()
def measure_times(size: Size) -> Part:
    """Processor seconds to encode one input, by encoder and size: the best of three."""
    part: Part = {}
    for encoder in ENCODERS:
        model = make_model(TASKS["hull"], encoder, size, 0).eval()
        part[encoder] = {}
        for count in size.timed:
            points, seconds = torch.rand(1, count, 2), []
            for _ in range(3):
                start = time.process_time()
                model.encode(points)
                seconds.append(time.process_time() - start)
            part[encoder][str(count)] = min(seconds)
    return part


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Scores of each task, and times, as far as they are measured."""
    made: dict[str, Table] = {}
    for name in TASKS:
        rows, counts = [], []
        for encoder, part in section(parts, name).items():
            counts = [f"{int(count):,} points" for count in part["scores"]]
            scores = (f"{100 * right:.0f}%; {x:.3f}" for right, x in part["scores"].values())
            rows.append((encoder, *scores, f"{part['loss']:.3f}", f"{part['cpu_seconds']:.0f}"))
        if rows:
            made[name] = Table(("encoder", *counts, "last loss", "training, s"), rows)
    if times := parts.get("times"):
        rows = [
            (encoder, *(f"{1e3 * seconds:,.1f}" for seconds in times[encoder].values()))
            for encoder in ENCODERS
        ]
        made["times"] = Table(("encoder", *(f"{int(count):,}" for count in times["favor"])), rows)
    return made
