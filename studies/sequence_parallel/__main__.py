"""``python -m studies.sequence_parallel``: training steps on one long row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from performers.app.options import OptionError, Options, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once

app = App()


@dataclass(frozen=True, kw_only=True)
class SequenceParallelOptions(Options):
    """Options of the study."""

    output_folder: Path = option("Folder of the results.", flag="--output")
    length: int = option("Residues of the row.", 65_536, at_least=1)
    steps: int = option("Training steps.", 5, at_least=1)
    trainer: bool = option("Train as performers train does, and not by hand.", False)
    sequence_parallel: int = option(
        "Processes that share a row, with --trainer; all of them otherwise.", 1, at_least=1
    )
    fsdp: bool = option("Sharded weights, with --trainer.", False)

    def __post_init__(self) -> None:
        """Check that options go together.

        Raises:
            OptionError: An option of the trainer is given without it.
        """
        super().__post_init__()
        if not self.trainer and (self.fsdp or self.sequence_parallel > 1):
            raise OptionError("--sequence-parallel and --fsdp need --trainer")


@app.command()
def sequence_parallel(options: SequenceParallelOptions) -> None:
    """Train on one row over the processes of torchrun, or in one process."""
    import json

    import torch

    from performers.app.processes import is_first_process

    torch.set_num_threads(1)
    files = options.output_folder, options.length, options.steps
    if options.trainer:
        from studies.sequence_parallel.trainer import train_by_command

        seen = train_by_command(
            *files, sequence_parallel=options.sequence_parallel, fsdp=options.fsdp
        )
    else:
        from studies.sequence_parallel.training import train

        seen = train(*files)
    if is_first_process():
        print(json.dumps(seen))


if __name__ == "__main__":
    end_at_once()
    app()
