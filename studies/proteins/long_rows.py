"""Concatenated proteins in long rows, up to the length of a bacterial proteome."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState

from performers.app.errors import UserError
from performers.app.files import read_json, write_json
from performers.app.processes import is_first_process, process_count
from performers.app.progress import Report
from performers.benchmark.memory import OutOfMemoryError, ProbeError, peak_of, run_apart
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.proteins.inputs.packing import TokenDataset
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences
from performers.proteins.model_folder import load_model
from performers.proteins.scoring.evaluation import evaluate_rows
from performers.training.options import TrainingOptions
from studies.proteins.data import StudyData
from studies.proteins.runs import train_once, wait_for

Cost = dict[str, Any]
"""``seconds`` (median) and ``peak_bytes`` above the memory of the process before, model included;
both None where there is a ``failure``."""

_MOST_ROWS = 40
_WARM_UP_LENGTH = 64
_TIMEOUT = 1800.0
# Calls that are timed, after a first one.
_REPEATS = 3


def run_concatenated(
    options: TrainingOptions, data: StudyData, folder: Path, report: Report
) -> None:
    """A Performer on rows of concatenated proteins against the exact Transformer of equal time.

    The steps of three models are timed and their memory taken: the Performer, the exact
    Transformer of the same size, and that with as many layers as fit into the Performer's time a
    step (at least one). The Performer is trained for ``options.steps``, both Transformers for the
    steps that take as long, and all are scored on rows of concatenated test proteins.

    Raises:
        UserError: A step of the Performer cannot be timed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan_file, before = folder / "plan.json", folder / "plan-before.json"
    begun = is_first_process() and plan_file.exists()
    if begun and any(entry["cost"]["failure"] for entry in read_json(plan_file).values()):
        plan_file.replace(before)
    # Otherwise the others could still read the plan that is to be replaced.
    if process_count() > 1:
        PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()
    if is_first_process() and not plan_file.exists():
        earlier = read_json(before) if before.exists() else {}
        write_json(plan_file, _plan(options, data, earlier, report))
        before.unlink(missing_ok=True)
    wait_for(plan_file)
    for name, entry in read_json(plan_file).items():
        if entry["options"] is None:
            continue
        own, file = folder / name, folder / name / "result.json"
        chosen = TrainingOptions(**entry["options"])
        trained = train_once(data, chosen, own, report, f"training {name} on long rows")
        if is_first_process() and not file.exists():
            found = {"scores": _score(own, chosen, data, report), "seconds": trained["seconds"]}
            write_json(file, {**entry, **found, "name": name})
        wait_for(file)


def _plan(
    options: TrainingOptions, data: StudyData, earlier: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Options and cost of a step of each model; no options where the model cannot be trained.

    Costs of an earlier plan stand, for models may have been trained by it.
    """
    row = data.row(options.max_length)
    exact = replace(options, attention="exact", num_features=None)

    def cost(number: int, name: str, given: TrainingOptions) -> Cost:
        if name in earlier and not earlier[name]["cost"]["failure"]:
            return dict(earlier[name]["cost"])
        report("timing steps on long rows", number, 3, {})
        return measure_cost(given, row, backward=True)

    performer = cost(0, "performer", options)
    if performer["failure"]:
        raise UserError(
            f"a step of the Performer on {len(row):,} tokens could not be timed "
            f"({performer['failure']}); end what else runs here, or take the study to a larger "
            "machine, and repeat the command with --resume"
        )
    same = cost(1, "transformer", exact)
    transformers = [("transformer", exact, same)]
    share = performer["seconds"] / same["seconds"] if same["seconds"] else 0.0
    layers = max(1, int(share * exact.num_layers))
    if layers < exact.num_layers:
        name, fewer = f"transformer-{layers}-layers", replace(exact, num_layers=layers)
        transformers.append((name, fewer, cost(2, name, fewer)))
    plan: dict[str, Any] = {"performer": {"options": options.to_dict(), "cost": performer}}
    for name, given, measured in transformers:
        plan[name] = {"options": None, "cost": measured}
        if measured["seconds"]:
            steps = max(1, round(options.steps * performer["seconds"] / measured["seconds"]))
            plan[name]["options"] = _with_steps(given, steps).to_dict()
    report("timing steps on long rows", 3, 3, {})
    return plan


def _with_steps(options: TrainingOptions, steps: int) -> TrainingOptions:
    share = steps / options.steps
    scaled: dict[str, Any] = {
        name: None if value is None else max(1, round(value * share))
        for name in ("warmup_steps", "eval_steps", "save_steps")
        for value in [getattr(options, name)]
    }
    return replace(options, steps=steps, **scaled)


def _score(
    folder: Path, options: TrainingOptions, data: StudyData, report: Report
) -> dict[str, Any]:
    model, tokenizer = load_model(folder)

    def score(sequences: list[str]) -> dict[str, Any]:
        tokens = encode_sequences(tokenizer, sequences)
        order = np.random.default_rng(0).permutation(len(tokens))
        dataset = TokenDataset(
            [tokens[index] for index in order], max_length=options.max_length, packed=True
        )
        # The last is short, and would be scored with less context.
        dataset.lengths = dataset.lengths[: min(_MOST_ROWS, max(1, len(dataset) - 1))]
        return evaluate_rows(
            model, tokenizer, dataset, batch_tokens=options.max_length, across_sequences=True
        )

    return data.scores(score, report, f"{folder.name} on long rows")


def measure_contexts(
    options: TrainingOptions,
    lengths: Sequence[int],
    longest_exact: int,
    data: StudyData,
    folder: Path,
    report: Report,
) -> None:
    """Time and memory of a forward pass over proteins one after another, against length."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "contexts.json"
    earlier = read_json(file)["rows"] if file.exists() else []
    rows = {(row["attention"], row["length"]): row for row in earlier}
    wanted = [
        (attention, length)
        for length in lengths
        for attention in ("identity", "favor-relu", "favor-softmax", "exact")
        if attention != "exact" or length <= longest_exact
    ]
    for number, (attention, length) in enumerate(wanted):
        report("forward against length", number, len(wanted), {})
        if not rows.get((attention, length), {"failure": "new"})["failure"]:
            continue
        own = replace(
            options,
            attention=attention,
            num_features=options.num_features if attention.startswith("favor") else None,
            max_length=max(lengths),
            batch_tokens=max(lengths),
        )
        cost = measure_cost(own, data.row(length), backward=False)
        rows[attention, length] = {"attention": attention, "length": length, **cost}
        write_json(file, {"rows": list(rows.values())})
    report("forward against length", len(wanted), len(wanted), {})


def measure_cost(options: TrainingOptions, row: npt.NDArray[np.integer], *, backward: bool) -> Cost:
    """Time and memory of a training step or a forward pass, in a separate process.

    Args:
        options: The model.
        row: Token ids, of shape (length,).
        backward: A step with the optimiser; otherwise a forward pass without gradients.

    Returns:
        The cost, or why there is none: out of memory, or too slow.
    """
    task = partial(time_and_peak, options=options.to_dict(), row=row.tolist(), backward=backward)
    try:
        return run_apart(task, threads=torch.get_num_threads(), timeout=_TIMEOUT)
    except ProbeError as error:
        failure = str(error)
        if isinstance(error, OutOfMemoryError) and not failure.startswith("killed"):
            failure = "out of memory"
        return {"seconds": None, "peak_bytes": None, "failure": failure}


def time_and_peak(options: dict[str, Any], row: list[int], backward: bool) -> Cost:
    """The cost of one call; runs in a separate process."""
    given, tokens = TrainingOptions(**options), torch.tensor(row)
    # Loads libraries and starts threads, whose memory is not that of the call.
    _call(given, tokens[:_WARM_UP_LENGTH], backward)()
    seconds: list[float] = []

    def calls() -> Callable[[], object]:
        call = _call(given, tokens, backward)
        # The first makes the optimiser's state.
        call()
        for _ in range(_REPEATS):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return call

    nbytes = peak_of(calls).nbytes
    if torch.cuda.is_available():
        nbytes = torch.cuda.max_memory_allocated()
    return {"seconds": statistics.median(seconds), "peak_bytes": nbytes, "failure": ""}


def _call(options: TrainingOptions, row: torch.Tensor, backward: bool) -> Callable[[], object]:
    torch.manual_seed(options.seed)
    is_causal, device = options.objective == "clm", "cuda" if torch.cuda.is_available() else "cpu"
    model_class = PerformerForCausalLM if is_causal else PerformerForMaskedLM
    model = model_class(options.model_config(build_protein_tokenizer())).to(device)
    model.train(backward)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = row[None].to(device)
    extra = {"use_cache": False} if is_causal else {}
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate) if backward else None

    def call() -> None:
        with (
            torch.inference_mode(not backward),
            torch.autocast(device, torch.bfloat16, enabled=options.bf16),
        ):
            out = model(rows, labels=rows if backward else None, **extra)
        if optimizer is not None:
            out.loss.backward()
            optimizer.step()
            # Gradients are no part of the next forward pass's memory.
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return call
