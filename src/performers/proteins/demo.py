"""The demo: three small models on the embedded proteins, compared and read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.app.errors import Interrupted, UserError
from performers.app.files import read_json
from performers.app.provenance import write_result
from performers.proteins.embedded import embedded_fasta
from performers.proteins.inputs.fasta import read_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.options import DEMO_STEPS
from performers.training.options import TrainingOptions

if TYPE_CHECKING:
    from performers.app.progress import Report
    from performers.proteins.report.page import ModelReport

MODELS = {
    "performer-softmax": "favor-softmax",
    "performer-relu": "favor-relu",
    "transformer": "exact",
}
EVALUATED = ("test", "ood")

_ATTENTION_SEQUENCES = 100
_ATTENTION_LENGTH = 256
_VALIDATION_STRIDE = 6
_SHOWN_STRIDE = 7
# The share of a model's work that is training, for the estimate of what is left.
_TRAINING_PERCENT = 80
_STOP_SECONDS = 60.0
# Modules with torch, which the server of processes imports once. This module is light, so that the
# server does so at once and not after its parent.
_HEAVY = ("model_folder", "report.model_report", "scoring.evaluation", "training.train")


@dataclass(frozen=True)
class _Job:
    """One model to train, evaluate and read."""

    name: str
    folder: Path
    attention: str
    steps: int
    seed: int
    splits: dict[str, list[ProteinRecord]]
    resume: bool


def _training_options(job: _Job) -> TrainingOptions:
    """Options of a model's training, which differ in the attention alone."""
    return TrainingOptions(
        attention=job.attention,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        # Within a family the position in the protein is informative; these learn it fastest.
        position_embedding="learned",
        max_length=512,
        # Small batches and many steps make the best use of a minute on two cores.
        batch_tokens=1024,
        steps=job.steps,
        learning_rate=4e-3,
        weight_decay=0.05,
        dropout=0.0,
        redraw_steps=0,
        seed=job.seed,
        eval_steps=max(1, job.steps // 8),
        save_steps=max(1, job.steps // 4),
    )


def run_demo(
    output: Path,
    *,
    steps: int = DEMO_STEPS,
    seed: int = 0,
    resume: bool = False,
    report: Report | None = None,
) -> dict[str, dict[str, Any]]:
    """Train, evaluate and read the models of ``MODELS``, side by side.

    Each model has a process with one thread: matrices this small gain nothing from a second one.
    Writes ``metrics.json``, ``report.html`` with ``figures/``, and a folder per model in
    ``models/``. Ctrl-C raises ``Interrupted``; checkpoints are in the folder.

    Args:
        output: Folder to write to.
        steps: Optimiser steps of each model.
        seed: Seed of weights, data order and masks.
        resume: Keep what an interrupted demo has finished, and continue the rest.
        report: Called with what is being done, how much of it is done, how much there is, and a
            log entry.

    Returns:
        Contents of ``metrics.json``: model name to ``test`` and ``ood`` (see `evaluate_model`),
        ``train_seconds``, ``steps`` and ``parameters``.

    Raises:
        UserError: A model cannot be trained.
        RuntimeError: The process of a model failed.
    """
    splits = {
        name: read_fasta(embedded_fasta(name))[0] for name in ("train", "validation", *EVALUATED)
    }
    jobs = [
        _Job(name, output / "models" / name, attention, steps, seed, splits, resume)
        for name, attention in MODELS.items()
    ]
    found = _run_jobs(jobs, output, report)
    from performers.proteins.report.page import write_report

    described = [found[name][1] for name in MODELS]
    metrics = {name: found[name][0] for name in MODELS}
    write_report(output, models=described, title="Three protein models on Swiss-Prot families")
    write_result(output / "metrics.json", metrics, "demo", seed=seed)
    return metrics


def _run_jobs(
    jobs: Sequence[_Job], output: Path, report: Report | None
) -> dict[str, tuple[dict[str, Any], ModelReport]]:
    """Run each job in a process; the results by name."""
    # Windows has no server of processes.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([f"performers.proteins.{name}" for name in _HEAVY])
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    processes: dict[connection.Connection, BaseProcess] = {}
    try:
        for job in jobs:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(job, theirs), name=job.name, daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        return _collect(processes, report)
    except KeyboardInterrupt as error:
        for process in processes.values():
            # Training then saves a checkpoint.
            process.terminate()
        for process in processes.values():
            process.join(_STOP_SECONDS)
        raise Interrupted(
            f"interrupted; what is done is in {output}, --resume goes on from there"
        ) from error
    finally:
        for process in processes.values():
            process.kill()
            process.join()
        for name, value in threads.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _collect(
    processes: dict[connection.Connection, BaseProcess], report: Report | None
) -> dict[str, tuple[dict[str, Any], ModelReport]]:
    """Hand progress on until all processes have sent their results.

    Raises:
        RuntimeError: A process failed; what it raised for the user is raised as it was.
    """
    names = {pipe: process.name for pipe, process in processes.items()}
    found: dict[str, tuple[dict[str, Any], ModelReport]] = {}
    percent = dict.fromkeys(names.values(), 0)
    while len(found) < len(names):
        for pipe in connection.wait([x for x, name in names.items() if name not in found]):
            assert isinstance(pipe, connection.Connection)
            name = names[pipe]
            try:
                kind, content = pipe.recv()
            except EOFError:
                processes[pipe].join()
                code = processes[pipe].exitcode
                raise RuntimeError(f"the process of {name} ended with exit code {code}") from None
            if kind == "error":
                raise content
            if kind == "result":
                found[name], percent[name] = pickle.loads(content), 100
            elif report is not None:
                what, done, total, entry = content
                report(what, done, total, entry)
                if what.startswith("training"):
                    percent[name] = _TRAINING_PERCENT * done // max(total, 1)
            if report is not None:
                report("demo, percent", sum(percent.values()) // len(percent), 100, {})
    return found


def _child(job: _Job, pipe: connection.Connection) -> None:
    """Do a job in this process, and send progress, then the result or an error."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A demo that is killed leaves nothing behind.
    watch = threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True)
    watch.start()
    if hasattr(os, "setsid"):
        # Ctrl-C goes to the demo, which stops its processes in order.
        os.setsid()
    try:
        found = _run_job(job, lambda *work: pipe.send(("progress", work)))
        # As bytes: torch would hand tensors over in memory that ends with this process.
        pipe.send(("result", pickle.dumps(found)))
    except (UserError, Interrupted) as error:
        pipe.send(("error", error))
    except Exception:
        pipe.send(("error", RuntimeError(f"{job.name} failed:\n{traceback.format_exc()}")))


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _run_job(job: _Job, report: Report) -> tuple[dict[str, Any], ModelReport]:
    """Train, evaluate and read one model."""
    import torch

    from performers.proteins.model import ProteinModel
    from performers.proteins.model_folder import load_model
    from performers.proteins.report.model_report import choose_protein, describe_model
    from performers.proteins.scoring.evaluation import evaluate_model
    from performers.proteins.training.train import train_model

    torch.set_num_threads(1)
    # Not in the parent, which would import torch to look at the memory they ask for.
    options = _training_options(job)
    sequences = {
        name: [record.sequence for record in records] for name, records in job.splits.items()
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    if not (job.folder / "config.json").exists():
        train_model(
            sequences["train"],
            job.folder,
            options,
            # The file is sorted by family: take some of each.
            validation=sequences["validation"][::_VALIDATION_STRIDE],
            resume=job.resume,
            progress=lambda done, total, entry: report(f"training {job.name}", done, total, entry),
        )
    result = read_json(job.folder / "training.json")["result"]
    model, tokenizer = load_model(job.folder)
    scores = {}
    for number, split in enumerate(EVALUATED):
        report(f"evaluating {job.name}", number, len(EVALUATED), {})
        scores[split] = evaluate_model(
            model, tokenizer, sequences[split], max_length=options.max_length, seed=job.seed
        )
    report(f"evaluating {job.name}", len(EVALUATED), len(EVALUATED), {})
    metrics = {
        **scores,
        "train_seconds": result["seconds"],
        "steps": result["steps"],
        "parameters": result["parameters"],
    }
    described = describe_model(
        ProteinModel(model, tokenizer, job.folder),
        job.splits["test"],
        choose_protein(job.splits["test"], None, _ATTENTION_LENGTH),
        name=job.name,
        metrics=scores,
        max_sequences=_ATTENTION_SEQUENCES,
        max_length=_ATTENTION_LENGTH,
        # The page shows the proteins as one model reads them.
        shown=job.splits["test"][::_SHOWN_STRIDE] if job.name == next(iter(MODELS)) else (),
        report=report,
    )
    return metrics, described
