"""The demo: three small models on the embedded proteins, compared and read."""

from pathlib import Path
from typing import Any

import torch

from performers.app.files import read_json, write_json
from performers.proteins.embedded import embedded_fasta
from performers.proteins.inputs.fasta import ProteinRecord, read_fasta
from performers.proteins.model_folder import load_model
from performers.proteins.options import DEMO_STEPS, TrainingOptions
from performers.proteins.report.model_report import Report, choose_protein, describe_model
from performers.proteins.report.page import ModelReport, write_report
from performers.proteins.scoring.evaluation import evaluate_model
from performers.proteins.training.train import train_model

MODELS = {
    "performer-softmax": "favor-softmax",
    "performer-relu": "favor-relu",
    "transformer": "exact",
}
EVALUATED = ("test", "ood")

_ATTENTION_SEQUENCES = 100
_ATTENTION_LENGTH = 256
_VALIDATION_STRIDE = 6


def demo_options(attention: str, *, steps: int = DEMO_STEPS, seed: int = 0) -> TrainingOptions:
    """What each model of the demo is trained with: the same but for the attention."""
    return TrainingOptions(
        attention=attention,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        # Within a family, the place in the protein tells much: this learns it fastest.
        position_embedding="learned",
        max_length=512,
        # Small batches, many steps: what a minute on two cores is best spent on.
        batch_tokens=1024,
        steps=steps,
        learning_rate=4e-3,
        weight_decay=0.05,
        dropout=0.0,
        redraw_steps=0,
        seed=seed,
        eval_steps=max(1, steps // 8),
        save_steps=max(1, steps // 4),
    )


def run_demo(
    output: Path,
    *,
    steps: int = DEMO_STEPS,
    seed: int = 0,
    resume: bool = False,
    report: Report | None = None,
) -> dict[str, dict[str, Any]]:
    """Train, evaluate and read the models of ``MODELS``.

    Writes ``metrics.json``, ``report.html`` with ``figures/``, and a folder per model in
    ``models/``.

    Args:
        output: Folder to write to.
        steps: Optimiser steps of each model.
        seed: Seed of weights, data order and masks.
        resume: Keep what an interrupted demo has finished, and continue the rest.
        report: Called with what is being done, how much of it is done, how much there is, and a
            log entry.

    Returns:
        What ``metrics.json`` holds: model name to ``test`` and ``ood`` (each with accuracy,
        perplexity, loss, tokens, baseline_accuracy and baseline_perplexity), ``train_seconds``,
        ``steps`` and ``parameters``.
    """
    splits = {name: _records(name) for name in ("train", "validation", *EVALUATED)}
    # Matrices this small gain nothing from a second thread, and lose much where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(output, splits, steps, seed, resume, report)
    finally:
        torch.set_num_threads(threads)


def _run(
    output: Path,
    splits: dict[str, list[ProteinRecord]],
    steps: int,
    seed: int,
    resume: bool,
    report: Report | None,
) -> dict[str, dict[str, Any]]:
    sequences = {name: [record.sequence for record in records] for name, records in splits.items()}
    protein = choose_protein(splits["test"], None, _ATTENTION_LENGTH)
    metrics: dict[str, dict[str, Any]] = {}
    described: list[ModelReport] = []
    for name, attention in MODELS.items():
        folder = output / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        options = demo_options(attention, steps=steps, seed=seed)

        def log(done: int, total: int, entry: dict[str, float], name: str = name) -> None:
            if report is not None:
                report(f"training {name}", done, total, entry)

        if not (folder / "config.json").exists():
            train_model(
                sequences["train"],
                folder,
                options,
                # The file is sorted by family: take some of each.
                validation=sequences["validation"][::_VALIDATION_STRIDE],
                resume=resume,
                progress=log,
            )
        result = read_json(folder / "training.json")["result"]
        model, tokenizer = load_model(folder)
        scores = {
            split: evaluate_model(
                model, tokenizer, sequences[split], max_length=options.max_length, seed=seed
            )
            for split in EVALUATED
        }
        metrics[name] = {
            **scores,
            "train_seconds": result["seconds"],
            "steps": result["steps"],
            "parameters": result["parameters"],
        }
        described.append(
            describe_model(
                folder,
                model,
                tokenizer,
                sequences["test"],
                protein,
                name=name,
                metrics=scores,
                max_sequences=_ATTENTION_SEQUENCES,
                max_length=_ATTENTION_LENGTH,
                report=report,
            )
        )
    write_report(output, models=described, title="Three protein models on Swiss-Prot families")
    write_json(output / "metrics.json", metrics)
    return metrics


def _records(split: str) -> list[ProteinRecord]:
    return read_fasta(embedded_fasta(split))[0]
