"""Training of a contestant within a limit of processor time, and bits per dimension on pictures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.utils.data import BatchSampler

from performers.cli.console import note
from performers.models import PerformerForCausalLM
from performers.streams.images import CentreCrops, RandomCrops
from performers.training.environment import quiet_transformers
from performers.training.options import TrainingOptions
from performers.training.run import TrainingRun
from performers.training.trainer import RunTrainer
from studies.images.models import MOST_STEPS, Size, make_model
from studies.parts import Part

GROUP = 5
"""Steps of a point of a curve."""

_SAVED = 20


class _PixelTrainer(RunTrainer):
    """Trainer on one picture a step, in the order of places."""

    def sampler(self, batches: int) -> BatchSampler:
        """The first places."""
        return BatchSampler(range(batches), 1, drop_last=False)


def train_and_score(
    name: str,
    options: dict[str, Any],
    size: Size,
    crops: RandomCrops,
    tests: CentreCrops,
    folder: Path,
) -> Part:
    """Train a contestant in a folder, or continue the run in it, and score it.

    Returns:
        ``steps``, ``processor_seconds``, ``parameters``, the ``curve``: bits per dimension of
        ``GROUP`` training pictures each, and ``bits`` of each test picture that it scored.
    """
    training = TrainingOptions(
        objective="clm",
        attention=options["attention"],
        attention_options=options.get("attention_options"),
        window=options.get("window"),
        hidden_size=size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        intermediate_size=size.inner,
        num_features=size.features,
        dropout=0.0,
        max_length=size.length,
        batch_tokens=size.length,
        steps=MOST_STEPS,
        time_limit=size.seconds,
        optimizer="muon",
        learning_rate=size.learning_rate,
        warmup_steps=size.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        redraw_steps=0,
        seed=size.seed,
        log_steps=1,
        save_steps=_SAVED,
        eval_steps=MOST_STEPS,
        device="cpu",
    )
    data = {"sha256": crops.pictures.fingerprint(), "model": options, "size": asdict(size)}
    run = TrainingRun(folder, data, training, resume=(folder / "training.json").exists())

    def make_trainer() -> RunTrainer:
        return _PixelTrainer(run=run, model=make_model(options, size), dataset=crops, measure=None)

    result = run.train(make_trainer, None, progress=_progress(name))
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] / math.log(2) for entry in log if "loss" in entry]
    groups = range(0, len(losses) - GROUP + 1, GROUP)
    curve = [round(fmean(losses[start : start + GROUP]), 3) for start in groups]
    with quiet_transformers():
        model = PerformerForCausalLM.from_pretrained(folder)
    names = ("steps", "processor_seconds", "parameters")
    bits = score(model, tests, size.score_seconds)
    return {**{key: result[key] for key in names}, "curve": curve, "bits": bits}


def _progress(name: str) -> Callable[[int, int, dict[str, float]], None]:
    def report(step: int, steps: int, logs: dict[str, float]) -> None:
        if "loss" in logs and step % 10 == 0:
            note(f"{name}: step {step}, {logs['loss'] / math.log(2):.2f} bits/dim")

    return report


@torch.no_grad()
def score(model: PerformerForCausalLM, crops: CentreCrops, seconds: float) -> list[float]:
    """Bits per dimension of the first pictures, as many as are scored within a processor time."""
    model.eval()
    start = time.process_time()
    bits: list[float] = []
    for index in range(len(crops)):
        if bits and time.process_time() - start > seconds:
            break
        row = {name: values[None] for name, values in crops[index].items()}
        bits.append(model(**row, use_cache=False).loss.item() / math.log(2))
    return bits
