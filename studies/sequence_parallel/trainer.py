"""``performers train`` on long rows over processes, against the same run in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from performers.app.processes import is_first_process, process_count
from performers.benchmark.memory import peak_of
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.options import TrainingOptions
from performers.proteins.training.train import train_model


def train_by_command(
    folder: Path, length: int, steps: int, *, sequence_parallel: int = 1, fsdp: bool = False
) -> dict[str, Any]:
    """Train as ``performers train`` does, and compare with the run of one process.

    A step reads a row for each group of processes that share one. The run of one process reads as
    many, one after the other; it goes first.

    Returns:
        The processes, MiB that the largest process took for training, and the errors.
    """
    world = process_count()
    readers = world // sequence_parallel
    # In one process: rows for two readers, with --accumulation 2 in its place.
    name = f"{world}-{sequence_parallel}{'-fsdp' if fsdp else ''}"
    draw = np.random.default_rng(1)
    letters = np.array(list(AMINO_ACIDS))
    rows = ["".join(draw.choice(letters, length - 2)) for _ in range(4)]
    seen: dict[str, Any] = {"processes": world, "sequence_parallel": sequence_parallel}
    seen |= {"fsdp": fsdp, "length": length}
    for rows_a_step in (1, 2) if world == 1 else (readers,):
        output = folder / f"rows-{rows_a_step}" / name
        options = TrainingOptions(
            objective="clm",
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=128,
            num_features=64,
            window=64,
            dropout=0.0,
            max_length=length,
            batch_tokens=length,
            accumulation=rows_a_step // readers,
            steps=steps,
            warmup_steps=1,
            redraw_steps=2,
            log_steps=1,
            save_steps=steps,
            device="cpu",
            sequence_parallel=sequence_parallel,
            fsdp=fsdp,
        )

        def run(output: Path = output, options: TrainingOptions = options) -> None:
            train_model(rows, output, options, validation=[])

        used = torch.tensor(peak_of(run).nbytes)
        if world > 1:
            dist.all_reduce(used, dist.ReduceOp.MAX)
        seen["mebibytes"] = used.item() / 2**20
        alone = output.parent / "1-1"
        if is_first_process() and alone != output and alone.is_dir():
            seen["loss_error"] = max(
                abs(a - b) / abs(b) for a, b in zip(_losses(output), _losses(alone), strict=True)
            )
            ours, theirs = (load_file(x / "model.safetensors") for x in (output, alone))
            seen["parameter_error"] = max(
                ((ours[key] - x).abs().max() / x.abs().max()).item() for key, x in theirs.items()
            )
        if is_first_process():
            (output / "seen.json").write_text(json.dumps(seen, indent=2) + "\n")
    return seen


def _losses(output: Path) -> list[float]:
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]
