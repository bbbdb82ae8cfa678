"""``performers study proteins``: every run in turn, tables and a page as far as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import read_json, write_json
from performers.app.processes import is_first_process, process_count
from performers.proteins.model_folder import load_model
from performers.proteins.options import TrainingOptions
from performers.proteins.report.comparison import compare_learnt
from performers.proteins.report.model_report import choose_protein
from performers.study.comparison import Report, execute, planned_runs
from performers.study.data import StudyData
from performers.study.long_context import measure_contexts, run_concatenated
from performers.study.page import write_study_report
from performers.study.presets import StudyPreset

LEARNT = ("favor-relu", "favor-softmax", "exact")
"""Attentions whose masked models are read for what they learnt."""

_PROTEIN_LENGTH = 256


def run_study(
    output: Path,
    data: StudyData,
    preset: StudyPreset,
    *,
    name: str,
    report: Report | None = None,
) -> Path:
    """Do what is not done of a study, one model at a time.

    ``output`` receives ``study.json`` (settings), ``runs/``, ``concatenated/``, ``contexts.json``,
    ``learnt/``, and, anew after every run, ``tables.md``, ``figures/`` and ``report.html``. Killed
    at any point, it goes on from the last checkpoint when called again.

    Args:
        output: The folder.
        data: What to train and score on.
        preset: The size of the study.
        name: Of the preset.
        report: Called with what is being done, how much of it is done, how much there is, and a
            log entry.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: The folder holds another study, a run diverges, or the Performer's step on long
            rows cannot be timed.
        Interrupted: It was stopped by a signal and has saved a checkpoint.
    """
    settings = {
        "preset": name,
        **_plain(asdict(preset)),
        **data.identity,
        "data_name": data.name,
        "processes": process_count(),
    }
    file = output / "study.json"
    if is_first_process():
        if file.exists():
            _check_same(file, settings)
        else:
            write_json(file, settings)
    runs = planned_runs(preset)
    for number, run in enumerate(runs):
        if report is not None:
            report("the study", number, len(runs), {})
        execute(run, data, output / "runs" / run.name, report)
        _write(output)
    if report is not None:
        report("the study", len(runs), len(runs), {})
    if preset.long is not None:
        run_concatenated(preset.long, data, output / "concatenated", report)
    if is_first_process():
        if preset.context_lengths:
            options = replace(preset.training, objective="mlm", position_embedding="rotary")
            lengths, longest_exact = preset.context_lengths, preset.context_exact
            measure_contexts(options, lengths, longest_exact, data, output, report)
        _read_models(output, data, preset, report)
    _write(output)
    return output / "report.html"


def _write(output: Path) -> None:
    if is_first_process():
        write_study_report(output)


def _read_models(output: Path, data: StudyData, preset: StudyPreset, report: Report | None) -> None:
    """What the masked models of the first seed learnt, side by side."""
    folder = output / "learnt"
    if not preset.learnt or (folder / "learnt.json").exists():
        return
    seed = preset.seeds[0]
    models = {
        attention: load_model(output / "runs" / f"mlm-{attention}-seed{seed}")
        for attention in LEARNT
        if (output / "runs" / f"mlm-{attention}-seed{seed}" / "config.json").exists()
    }
    if not models:
        return
    records = data.scored["test"]

    def progress(model: str, done: int, total: int) -> None:
        if report is not None:
            report(f"reading {model}", done, total, {})

    found = compare_learnt(
        models,
        [record.sequence for record in records],
        choose_protein(records, None, _PROTEIN_LENGTH),
        figures=folder,
        max_sequences=preset.learnt,
        max_length=min(512, preset.training.max_length),
        progress=progress,
    )
    found["figures"] = {name: Path(path).name for name, path in found["figures"].items()}
    write_json(folder / "learnt.json", found)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_same(file: Path, settings: Mapping[str, Any]) -> None:
    earlier = read_json(file)
    for key in ("training", "long"):
        if isinstance(earlier.get(key), dict):
            # Options that are newer than the study were at their defaults.
            earlier[key] = _plain({**TrainingOptions().to_dict(), **earlier[key]})
    changed = [key for key in settings if earlier.get(key) != settings[key]]
    if changed:
        raise UserError(
            f"{file.parent} holds a study with other settings ({', '.join(changed)}); repeat "
            "those, or give another --output"
        )
