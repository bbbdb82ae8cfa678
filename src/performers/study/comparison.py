"""The runs of a study: one model trained and scored each, each found again when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers.app.errors import Diverged
from performers.app.files import read_json, write_json
from performers.app.processes import is_first_process
from performers.proteins.model_folder import load_model
from performers.proteins.options import TrainingOptions
from performers.proteins.scoring.evaluation import evaluate_model
from performers.proteins.training.train import train_model
from performers.study.data import StudyData
from performers.study.presets import StudyPreset

Report = Callable[[str, int, int, Mapping[str, float]], None]

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """One model of the study.

    Attributes:
        experiment: ``"comparison"`` or ``"kernels"``.
        options: What it is trained with.
    """

    experiment: str
    options: TrainingOptions

    @property
    def name(self) -> str:
        """Its folder below ``runs``."""
        options = self.options
        return f"{options.objective}-{options.attention}-seed{options.seed}"


def planned_runs(preset: StudyPreset) -> list[Run]:
    """All runs, a whole comparison of one seed before the next seed."""
    runs: list[Run] = []
    for number, seed in enumerate(preset.seeds):
        for objective, attentions in (("mlm", preset.masked), ("clm", preset.causal)):
            for attention in attentions:
                if number and attention in preset.once:
                    continue
                runs.append(Run("comparison", preset.options(objective, attention, seed)))
        if number == 0:
            for kernel_seed in preset.kernel_seeds:
                for attention in preset.kernels:
                    options = preset.options("mlm", attention, kernel_seed)
                    runs.append(Run("kernels", options))
    return runs


def execute(run: Run, data: StudyData, folder: Path, report: Report | None = None) -> None:
    """Train and score one model, or what of it is not done yet; a training that diverges is noted.

    Under several processes all train together and the first scores.

    Args:
        run: The run.
        data: What to train and score on.
        folder: Its folder, which receives the model and ``result.json``.
        report: Called with what is being done, how much of it is done, how much there is, and a
            log entry.

    Raises:
        UserError: The folder holds another run.
        Interrupted: The run was stopped by a signal and has saved a checkpoint.
    """

    def log(done: int, total: int, entry: Mapping[str, float]) -> None:
        if report is not None:
            report(f"training {run.name}", done, total, entry)

    file = folder / "result.json"
    about = {
        "experiment": run.experiment,
        "attention": run.options.attention,
        "objective": run.options.objective,
        "seed": run.options.seed,
    }
    if file.exists():
        return
    try:
        trained = train_once(data, run.options, folder, log)
    except Diverged as error:
        # A result like any other, and the same each time: the study goes on without it.
        if is_first_process():
            write_json(file, {**about, "failure": str(error)})
        return
    if not is_first_process():
        wait_for(file)
        return
    model, tokenizer = load_model(folder)
    scores = {}
    for number, (split, records) in enumerate(data.scored.items()):
        if report is not None:
            report(f"scoring {run.name}", number, len(data.scored), {})
        scores[split] = evaluate_model(
            model,
            tokenizer,
            [record.sequence for record in records],
            max_length=run.options.max_length,
            batch_tokens=max(8192, run.options.max_length),
        )
    if report is not None:
        report(f"scoring {run.name}", len(data.scored), len(data.scored), {})
    result = {
        **about,
        "parameters": trained["parameters"],
        "steps": trained["steps"],
        "seconds": trained["seconds"],
        "scores": scores,
    }
    write_json(file, result)


def train_once(
    data: StudyData,
    options: TrainingOptions,
    folder: Path,
    progress: Callable[[int, int, Mapping[str, float]], None],
) -> dict[str, Any]:
    """Train a model, or what is not done yet of its training.

    Args:
        data: What to train and validate on.
        options: What to train and how.
        folder: Its folder; made where it is missing.
        progress: See ``train_model``.

    Returns:
        See ``train_model``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "training.json"
    begun = record.exists()
    # Written last of a training, when the model and its log are whole.
    ended = read_json(record).get("result") if begun else None
    if ended is not None:
        return dict(ended)
    return train_model(
        data.train,
        folder,
        options,
        validation=data.validation,
        resume=begun,
        progress=progress,
    )


def wait_for(file: Path) -> None:
    """Wait until the first process has written a file.

    A collective operation in its place ends the run when the first takes longer than its timeout.
    """
    while not file.exists():
        time.sleep(_POLL_SECONDS)


def results(folder: Path) -> Iterator[dict[str, Any]]:
    """The results of the runs that are done, in the order of their names."""
    for path in sorted(folder.glob("*/result.json")):
        yield read_json(path)
