"""The runs of a study: each model trained and scored once, and kept when it is done."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from performers.app.errors import Diverged, UserError
from performers.app.files import read_json, write_json
from performers.app.processes import is_first_process, process_count
from performers.app.progress import Report
from performers.proteins.model_folder import load_model
from performers.proteins.report.model_report import choose_protein
from performers.proteins.scoring.evaluation import evaluate_model
from performers.proteins.training.train import train_model
from performers.training.options import TrainingOptions
from studies.parts import as_json
from studies.proteins.data import StudyData
from studies.proteins.learnt import compare_learnt
from studies.proteins.presets import StudyPreset

LEARNT = ("favor-relu", "favor-softmax", "exact")
"""Attentions whose masked models are read for what they learnt."""

_PROTEIN_LENGTH = 256
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """One model of the study."""

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
                if not number or attention not in preset.once:
                    runs.append(Run("comparison", preset.options(objective, attention, seed)))
        if number == 0:
            runs += [
                Run("kernels", preset.options("mlm", attention, kernel_seed))
                for kernel_seed in preset.kernel_seeds
                for attention in preset.kernels
            ]
    return runs


def run_study(
    output: Path,
    data: StudyData,
    preset: StudyPreset,
    *,
    name: str,
    report: Report = lambda *work: None,
) -> Path:
    """Do the rest of a study, one model at a time.

    ``output`` receives ``study.json`` (settings), ``runs/``, ``concatenated/``, ``contexts.json``,
    ``learnt/``, and, anew after every run, ``results.json``, ``report.md`` and ``figures/``. Killed
    at any point, it goes on from the last checkpoint when called again.

    Raises:
        UserError: The folder holds another study, or the Performer's step on long rows cannot be
            timed.
        Interrupted: The study was stopped by a signal and has saved a checkpoint.
    """
    from studies.proteins.long_rows import measure_contexts, run_concatenated
    from studies.proteins.report import write_report

    def write() -> None:
        if is_first_process():
            write_report(output)

    if is_first_process():
        _check_same(output / "study.json", preset, data, name)
    runs = planned_runs(preset)
    for number, run in enumerate(runs):
        report("the study", number, len(runs), {})
        execute(run, data, output / "runs" / run.name, report)
        write()
    report("the study", len(runs), len(runs), {})
    if preset.long is not None:
        run_concatenated(preset.long, data, output / "concatenated", report)
    if is_first_process():
        if preset.context_lengths:
            options = replace(preset.training, objective="mlm", position_embedding="rotary")
            lengths, longest_exact = preset.context_lengths, preset.context_exact
            measure_contexts(options, lengths, longest_exact, data, output, report)
        _read_models(output, data, preset, report)
    write()
    return output / "report.md"


def execute(run: Run, data: StudyData, folder: Path, report: Report) -> None:
    """Train and score one model, or the rest of it; a training that diverges is noted.

    Under several processes all train together and the first scores.
    """
    file, options = folder / "result.json", run.options
    if file.exists():
        return
    result: dict[str, Any] = {
        "experiment": run.experiment,
        "attention": options.attention,
        "objective": options.objective,
        "seed": options.seed,
    }
    try:
        trained = train_once(data, options, folder, report, f"training {run.name}")
    except Diverged as error:
        # A result like any other, and the same each time: the study goes on without it.
        if is_first_process():
            write_json(file, {**result, "failure": str(error)})
        return
    if is_first_process():
        score = partial(
            evaluate_model,
            *load_model(folder),
            max_length=options.max_length,
            batch_tokens=max(8192, options.max_length),
            by_sequence=True,
        )
        result |= {name: trained[name] for name in ("parameters", "steps", "seconds")}
        write_json(file, {**result, "scores": data.scores(score, report, run.name)})
    wait_for(file)


def train_once(
    data: StudyData, options: TrainingOptions, folder: Path, report: Report, name: str
) -> dict[str, Any]:
    """Train a model, or the rest of its training; returns what ``train_model`` does."""
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
        progress=lambda done, total, entry: report(name, done, total, entry),
    )


def wait_for(file: Path) -> None:
    """Wait until the first process has written a file.

    A collective operation would end the run when the first takes longer than its timeout.
    """
    while not file.exists():
        time.sleep(_POLL_SECONDS)


def _read_models(output: Path, data: StudyData, preset: StudyPreset, report: Report) -> None:
    """Read the masked models of the first seed, side by side."""
    folder = output / "learnt"
    if not preset.learnt or (folder / "learnt.json").exists():
        return
    folders = {x: output / "runs" / f"mlm-{x}-seed{preset.seeds[0]}" for x in LEARNT}
    models = {x: load_model(y) for x, y in folders.items() if (y / "config.json").exists()}
    if not models:
        return
    records = data.scored["test"]
    found = compare_learnt(
        models,
        [record.sequence for record in records],
        choose_protein(records, None, _PROTEIN_LENGTH),
        folder,
        max_sequences=preset.learnt,
        max_length=min(512, preset.training.max_length),
        progress=lambda model, done, total: report(f"reading {model}", done, total, {}),
    )
    write_json(folder / "learnt.json", found)


def _check_same(file: Path, preset: StudyPreset, data: StudyData, name: str) -> None:
    """Write the settings of a new study, or compare them with those of the one in the folder."""
    settings = as_json(
        {
            "preset": name,
            **asdict(preset),
            **data.identity,
            "data_name": data.name,
            "processes": process_count(),
        }
    )
    if not file.exists():
        write_json(file, settings)
        return
    earlier = read_json(file)
    for key in ("training", "long"):
        if isinstance(earlier.get(key), dict):
            # Options that are newer than the study were at their defaults.
            earlier[key] = {**as_json(TrainingOptions().to_dict()), **earlier[key]}
    changed = [key for key in settings if earlier.get(key) != settings[key]]
    if changed:
        raise UserError(
            f"{file.parent} holds a study with other settings ({', '.join(changed)}); repeat "
            "those, or give another --output"
        )
