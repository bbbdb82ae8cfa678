"""One process of a measurement; writes what the first one saw to a file.

``python -m studies.sequence_parallel.process loop FILE FOLDER LENGTH STEPS`` is the loop of
`training`; ``... trainer FILE`` and the arguments of ``performers`` runs that command.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def trainer(file: Path, arguments: list[str]) -> None:
    """Run a command, and write the rise of this process's resident memory to its peak."""
    from performers.benchmark.memory import peak_of
    from performers.cli import main

    def run() -> None:
        sys.argv = ["performers", *arguments]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise

    used = peak_of(run).nbytes
    file.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(used / 2**20))


def loop(file: Path, folder: str, length: str, steps: str) -> None:
    """Train by hand, and write what was seen."""
    import torch

    from studies.sequence_parallel.training import train

    torch.set_num_threads(1)
    seen = train(Path(folder), int(length), int(steps))
    if seen is not None:
        file.write_text(json.dumps(seen))


if __name__ == "__main__":
    kind, path, *rest = sys.argv[1:]
    if kind == "loop":
        loop(Path(path), *rest)
    else:
        trainer(Path(path), rest)
