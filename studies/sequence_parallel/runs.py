"""Runs in one process and in several, and the tables of what they took."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.app.errors import UserError
from studies.pages import ABSENT, Table
from studies.parts import Measures, Part, section

if TYPE_CHECKING:
    from studies.sequence_parallel.__main__ import SequenceParallelOptions

# A row whose activations are nothing beside what a process holds anyway.
_SHORT = 1024
# Memory is returned as it is freed: glibc keeps the threshold that it begins with, which it would
# raise with the sizes of freed tensors, and so by another rule for a row than for its shards.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
_MODEL = {
    "objective": "mlm",
    "hidden-size": 64,
    "layers": 2,
    "heads": 4,
    "intermediate-size": 128,
    "num-features": 64,
    "window": 64,
    "dropout": 0,
    "redraw-steps": 0,
    "validation-fraction": 0,
    "device": "cpu",
}


def measures(options: SequenceParallelOptions) -> Measures:
    """The measurements by name; those of one process come first."""
    folder, length = options.output_folder / "runs", options.length
    kinds = (("loop", _loop, options.steps), ("trainer", _trainer, options.trainer_steps))
    return {
        f"{name}, {n}": partial(run, folder, steps, n, length)
        for name, run, steps in kinds
        for n in options.processes
    }


def _loop(folder: Path, steps: int, processes: int, length: int) -> Part:
    """The loop of `training` on the row, and on one of a sixteenth of its length."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "loop.json"
    found = {}
    for name, tokens in (("short", length // 16), ("long", length)):
        file.unlink(missing_ok=True)
        _run(processes, "loop", file, folder, tokens, steps)
        found[name] = json.loads(file.read_text())
    return {"processes": processes, **found}


def _trainer(folder: Path, steps: int, processes: int, length: int) -> Part:
    """``performers train`` on the row, and on a short one, each with its peak of memory."""
    options = {
        **_MODEL, "steps": steps, "save-steps": steps, "max-length": length, "batch-tokens": length
    }  # fmt: skip
    if processes > 1:
        options["sequence-parallel"] = processes
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    folder.mkdir(parents=True, exist_ok=True)
    peaks: dict[str, list[float]] = {}
    for name, tokens in (("short", _SHORT), ("long", length)):
        fasta, output = folder / f"{name}.fasta", folder / f"{name}-{processes}"
        # Its begin and its end are tokens too.
        residues = random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=tokens - 2)
        fasta.write_text(f">{name}\n{''.join(residues)}\n")
        for old in folder.glob("peak.*"):
            old.unlink()
        shutil.rmtree(output, ignore_errors=True)
        command = ["train", fasta, "--output", output, *flags]
        _run(processes, "trainer", folder / "peak.json", *command)
        peaks[name] = [json.loads(path.read_text()) for path in sorted(folder.glob("peak.*"))]
    print(f"trainer, {processes}: MiB of each process {peaks}", flush=True)
    return {"processes": processes, **peaks}


def _run(processes: int, *arguments: Any) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    program = ["-m", "studies.sequence_parallel.process", *arguments]
    command = [sys.executable, *(launcher if processes > 1 else []), *program]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **_ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines()[-12:]
        raise UserError(f"a run of {processes} processes failed: {' | '.join(lines)}")


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Tables of the measurements that are done."""
    loops = list(section(parts, "loop").values())
    trainer = list(section(parts, "trainer").values())
    rows = [
        [*memory, *_seen(part)]
        for part, memory in zip(loops, _memory(loops, lambda seen: seen["mebibytes"]), strict=True)
    ]
    peaks = ("processes", "peak, short row", "peak, long row", "the row takes", "of one process")
    seen = ("error of the loss", "error of the parameters", "published a layer")
    return {
        "loop": Table((*peaks, *seen), rows),
        "trainer": Table(peaks, _memory(trainer, max)),
    }


def _memory(parts: list[Part], peak_of: Callable[[Any], float]) -> list[list[str]]:
    """Peaks of a short and a long row, and what the long one takes; the first is one process."""
    rows, alone = [], None
    for part in parts:
        short, long = (peak_of(part[name]) for name in ("short", "long"))
        alone = alone or long - short
        figures = [f"{x:.0f} MiB" for x in (short, long, long - short)]
        rows.append([str(part["processes"]), *figures, f"{(long - short) / alone:.2f}"])
    return rows


def _seen(part: Part) -> list[str]:
    """Errors on the long row, and the bytes of a message on both."""
    seen, sent = part["long"], {part[name]["message_bytes"] for name in ("short", "long")}
    errors = [f"{seen[x]:.1e}" if x in seen else ABSENT for x in ("loss_error", "parameter_error")]
    return [*errors, " / ".join(f"{x:,} B" for x in sorted(sent)) if any(sent) else ABSENT]
