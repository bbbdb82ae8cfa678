"""Runs in one process and in several, and the tables of what they took."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from studies.pages import ABSENT, Table
from studies.parts import Part

# A row whose activations are nothing beside what a process holds anyway.
_SHORT = 1024
_MODEL = {
    "objective": "clm",
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


class Runs:
    """Measurements of a study, by name.

    Args:
        folder: Folder of what the runs leave.
        length: Tokens of the row.
        processes: Numbers of processes, the first of them 1.
        steps: Training steps of the loop by hand.
        trainer_steps: Those of ``performers train``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        length: int,
        processes: Sequence[int],
        steps: int,
        trainer_steps: int,
    ) -> None:
        self.folder, self.length, self.processes = folder, length, processes
        self.steps, self.trainer_steps = steps, trainer_steps

    def parts(self) -> dict[str, partial[Part]]:
        """The measurements; those of one process come first."""
        several = self.processes[1:]
        return {
            **{f"loop, {n}": partial(self.loop, n, self.length) for n in self.processes},
            **{f"loop, {n}, short": partial(self.loop, n, self.length // 16) for n in several},
            **{f"trainer, {n}": partial(self.trainer, n) for n in self.processes},
        }

    def loop(self, processes: int, length: int) -> Part:
        """The loop of `training`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "loop.json"
        file.unlink(missing_ok=True)
        self._run(processes, "loop", file, self.folder, length, self.steps)
        return {"processes": processes, **json.loads(file.read_text())}

    def trainer(self, processes: int) -> Part:
        """``performers train`` on the row, and on a short one, each with its peak of memory."""
        peaks = {
            name: self._trained(processes, name, length)
            for name, length in (("short", _SHORT), ("long", self.length))
        }
        print(f"trainer, {processes}: MiB of each process {peaks}", flush=True)
        return {"processes": processes, **peaks}

    def _trained(self, processes: int, name: str, length: int) -> list[float]:
        self.folder.mkdir(parents=True, exist_ok=True)
        fasta, output = self.folder / f"{name}.fasta", self.folder / f"{name}-{processes}"
        # Its begin and its end are tokens too.
        residues = random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=length - 2)
        fasta.write_text(f">{name}\n{''.join(residues)}\n")
        file = self.folder / "peak.json"
        for old in self.folder.glob("peak.*"):
            old.unlink()
        shutil.rmtree(output, ignore_errors=True)
        options = {
            **_MODEL,
            "steps": self.trainer_steps,
            "save-steps": self.trainer_steps,
            "max-length": self.length,
            "batch-tokens": self.length,
        }
        if processes > 1:
            options["sequence-parallel"] = processes
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        command = ["train", fasta, "--output", output, *flags]
        self._run(processes, "trainer", file, *command)
        found: list[float] = [
            json.loads(path.read_text()) for path in sorted(self.folder.glob("peak.*"))
        ]
        return found

    def _run(self, processes: int, *arguments: Any) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        program = ["-m", "studies.sequence_parallel.process", *arguments]
        command = [sys.executable, *(launcher if processes > 1 else []), *program]
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
    return {
        "loop": Table(
            (
                "processes",
                "tokens",
                "error of the loss",
                "error of the parameters",
                "memory of training, each process",
                "published a layer",
            ),
            [_loop_row(x) for name, x in parts.items() if name.startswith("loop")],
            2,
        ),
        "trainer": Table(
            ("processes", "peak, short row", "peak, long row", "the row takes", "of one process"),
            list(_trainer_rows([x for name, x in parts.items() if name.startswith("trainer")])),
        ),
    }


def _loop_row(seen: Part) -> list[str]:
    errors = [f"{seen[x]:.1e}" if x in seen else ABSENT for x in ("loss_error", "parameter_error")]
    sent = f"{seen['message_bytes']:,} B" if seen["message_bytes"] else ABSENT
    memory = f"{seen['mebibytes']:.0f} MiB"
    return [str(seen["processes"]), f"{seen['length']:,}", *errors, memory, sent]


def _trainer_rows(seen: Sequence[Part]) -> list[list[str]]:
    rows, alone = [], None
    for part in seen:
        short, long = max(part["short"]), max(part["long"])
        alone = alone or long - short
        figures = [f"{x:.0f} MiB" for x in (short, long, long - short)]
        rows.append([str(part["processes"]), *figures, f"{(long - short) / alone:.2f}"])
    return rows
