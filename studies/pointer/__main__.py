"""``python -m studies.pointer``: pointer networks trained on few points and scored on many."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

from performers.app.options import option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import StudyOptions, run_parts

app = App()


@dataclass(frozen=True, kw_only=True)
class PointerOptions(StudyOptions):
    """Options of the study."""

    quick: bool = option("A size of seconds, to see that it runs.", False)
    steps: int = option("Training steps of a model.", 2000, at_least=1)
    seed: int = option("Random seed.", 0)
    threads: int = option("Threads of torch.", 1, at_least=1)


@app.command()
def pointer(options: PointerOptions) -> None:
    """Train with linear and with exact encoders on 50 points; score at 50, 200 and 1,000."""
    import torch

    from studies.pointer import training
    from studies.pointer.tasks import TASKS

    torch.set_num_threads(options.threads)
    size = training.QUICK if options.quick else training.Size(steps=options.steps)
    parts = {
        f"{task}, {encoder}": partial(training.train_and_score, task, encoder, size, options.seed)
        for task in TASKS
        for encoder in training.ENCODERS
    } | {"times": partial(training.measure_times, size)}
    settings = {**asdict(size), "seed": options.seed, "threads": options.threads}
    run_parts(options, parts, training.tables, settings=settings)


if __name__ == "__main__":
    end_at_once()
    app()
