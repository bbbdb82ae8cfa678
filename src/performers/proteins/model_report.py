"""Reports on trained models: what ``performers report`` and the demo write."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.proteins.errors import UserError
from performers.proteins.evaluation import evaluate_model
from performers.proteins.fasta import ProteinRecord
from performers.proteins.folders import read_json
from performers.proteins.model_folder import model_max_length
from performers.proteins.report import ModelReport, analyse_model, write_report

Report = Callable[[str, int, int, Mapping[str, float]], None]


def report_on_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[ProteinRecord],
    output: Path,
    *,
    protein: str | None = None,
    max_sequences: int = 200,
    max_length: int = 256,
    report: Report | None = None,
) -> Path:
    """Write ``report.html`` on one model and the sequences given.

    Args:
        folder: The model's folder, for its options and training log.
        model: The model.
        tokenizer: Its tokenizer.
        records: Proteins to read its attention from and to score it on.
        output: Folder of the report.
        protein: Name of the one whose attention is drawn; by default the first that is long
            enough to show structure and short enough to be read whole.
        max_sequences: Sequences read for amino-acid similarity.
        max_length: Tokens read of each.
        report: Called with what is being done, how much of it is done, how much there is, and a
            log entry.

    Returns:
        The path of the page.

    Raises:
        UserError: No sequence has that name.
    """
    drawn = choose_protein(records, protein, max_length)
    sequences = [record.sequence for record in records]
    metrics = evaluate_model(
        model,
        tokenizer,
        sequences,
        max_length=model_max_length(tokenizer),
        progress=_task(report, "evaluating"),
    )
    described = describe_model(
        folder,
        model,
        tokenizer,
        sequences,
        drawn,
        name=folder.resolve().name,
        metrics={"given sequences": metrics},
        max_sequences=max_sequences,
        max_length=max_length,
        report=report,
    )
    return write_report(output, models=[described])


def describe_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    protein: ProteinRecord,
    *,
    name: str,
    metrics: Mapping[str, Mapping[str, float]],
    max_sequences: int,
    max_length: int,
    report: Report | None = None,
) -> ModelReport:
    """One model's part of a report: settings, metrics, learning curve and attention.

    Args:
        folder: The model's folder, for its options and training log.
        model: The model.
        tokenizer: Its tokenizer.
        sequences: Proteins behind the amino-acid similarity.
        protein: The protein whose attention is drawn.
        name: Heading.
        metrics: Split to metrics.
        max_sequences: Sequences read for amino-acid similarity.
        max_length: Tokens read of each.
        report: See ``report_on_model``.

    Returns:
        What ``write_report`` takes.
    """
    analysis = analyse_model(
        model,
        tokenizer,
        sequences,
        protein=protein,
        max_sequences=max_sequences,
        max_length=max_length,
        progress=_task(report, f"reading attention, {name}"),
    )
    return ModelReport(
        name=name,
        settings=_settings(folder, model),
        metrics=metrics,
        history=_history(folder),
        analysis=analysis,
    )


def choose_protein(
    records: Sequence[ProteinRecord], name: str | None, max_length: int
) -> ProteinRecord:
    """The protein with a name, or the first of a length that makes a readable map.

    Raises:
        UserError: No sequence has that name.
    """
    if name is not None:
        for record in records:
            if record.name == name:
                return record
        known = ", ".join(record.name for record in records[:5])
        raise UserError(f"--protein {name!r} is not in the FASTA files; the first are {known}")
    for low in (80, 1):
        for record in records:
            if low <= len(record.sequence) <= max_length - 2:
                return record
    return records[0]


def _task(report: Report | None, name: str) -> Callable[[int, int], None] | None:
    if report is None:
        return None
    return lambda done, total: report(name, done, total, {})


def _settings(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    settings: dict[str, Any] = {
        "attention": config.attention,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "width": config.hidden_size,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    if config.attention.startswith("favor"):
        mechanism = model.base_model.layers[0].attention.mechanism
        settings["random features per head"] = mechanism.feature_map.num_features
    record = folder / "training.json"
    if record.exists():
        training = read_json(record)
        options = training.get("options", {})
        settings["objective"] = options.get("objective")
        settings["steps"] = options.get("steps")
        settings["tokens in a batch"] = options.get("batch_tokens")
        settings["seconds of training"] = training.get("result", {}).get("seconds")
        settings["training sequences"] = training.get("data", {}).get("sequences")
    return settings


def _history(folder: Path) -> list[dict[str, Any]]:
    state = folder / "trainer_state.json"
    return list(read_json(state).get("log_history", [])) if state.exists() else []
