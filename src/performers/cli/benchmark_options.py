"""Options that several benchmark commands share."""

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("--output", help="Folder of the results.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep what --output holds already, measure the rest.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Of torch; its own choice by default.")
]
Repeats = Annotated[int, typer.Option(help="Rounds; every contestant has a turn in each.")]
MinTime = Annotated[
    float, typer.Option(help="Seconds each is timed for at least, all rounds together.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Of inputs, projections and the order of turns.")
]


def listed(values: tuple[object, ...]) -> str:
    """Values with commas between, as options take them."""
    return ",".join(str(value) for value in values)
