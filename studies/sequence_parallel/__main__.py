"""``python -m studies.sequence_parallel``: training steps on one long row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from performers.app.options import Options, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once

app = App()


@dataclass(frozen=True, kw_only=True)
class SequenceParallelOptions(Options):
    """Options of the study."""

    output_folder: Path = option("Folder of the results.", flag="--output")
    length: int = option("Residues of the row.", 65_536, at_least=1)
    steps: int = option("Training steps.", 5, at_least=1)


@app.command()
def sequence_parallel(options: SequenceParallelOptions) -> None:
    """Train on one row over the processes of torchrun, or in one process."""
    import json

    import torch

    from studies.sequence_parallel.training import train

    torch.set_num_threads(1)
    print(json.dumps(train(options.output_folder, options.length, options.steps)))


if __name__ == "__main__":
    end_at_once()
    app()
