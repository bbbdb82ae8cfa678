"""``python -m studies.sequence_parallel``: one long row over processes, against one process."""

from __future__ import annotations

from dataclasses import dataclass

from performers.app.errors import UserError
from performers.app.options import option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import StudyOptions, run_parts

app = App()


@dataclass(frozen=True, kw_only=True)
class SequenceParallelOptions(StudyOptions):
    """Options of the study."""

    length: int = option("Tokens of the row.", 65_536, at_least=16_384)
    processes: tuple[int, ...] = option(
        "Numbers of processes, the first of them 1.", (1, 2, 4), rising=True
    )
    steps: int = option("Steps of the loop by hand.", 5, at_least=1)
    trainer_steps: int = option("Steps of performers train.", 2, at_least=1)

    def __post_init__(self) -> None:
        """Check the numbers of processes."""
        super().__post_init__()
        if self.processes[0] != 1:
            raise UserError(f"--processes must begin with 1, got {list(self.processes)}")


@app.command()
def sequence_parallel(options: SequenceParallelOptions) -> None:
    """Train on one row in one process and in several: errors, memory, traffic."""
    from studies.sequence_parallel.runs import measures, tables

    for name, part in run_parts(options, measures(options), tables).items():
        if name.startswith("loop"):
            sent = part["long"]["message_bytes"]
            print(f"{name}: {sent:,} bytes published a layer and process")


if __name__ == "__main__":
    end_at_once()
    app()
