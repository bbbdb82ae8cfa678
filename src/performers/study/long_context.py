"""Concatenated proteins in long rows, up to the length of a bacterial proteome."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from performers.app.errors import UserError
from performers.app.files import read_json, write_json
from performers.app.processes import is_first_process, process_count
from performers.proteins.inputs.packing import TokenDataset, pack_sequences
from performers.proteins.inputs.tokenizer import encode_sequences
from performers.proteins.model_folder import load_model
from performers.proteins.options import TrainingOptions
from performers.proteins.scoring.evaluation import evaluate_rows
from performers.study.comparison import Report, train_once, wait_for
from performers.study.cost import measure_cost
from performers.study.data import StudyData

_MOST_ROWS = 40


def run_concatenated(
    options: TrainingOptions, data: StudyData, folder: Path, report: Report | None = None
) -> None:
    """A Performer on rows of concatenated proteins against the exact Transformer of equal time.

    The steps of three models are timed and their memory taken: the Performer, the exact
    Transformer of the same size, and that with as many layers as fit into the Performer's time a
    step (at least one). The Performer is trained for ``options.steps``, both Transformers for the
    steps that take as long, and all are scored on rows of concatenated test proteins.

    Args:
        options: Of the Performer; ``packed`` and ``across_sequences``.
        data: What to train and score on.
        folder: Where to; finished parts found there are kept, failed measurements are repeated.
        report: Called with what is being done, how much of it is done, how much there is, and a
            log entry.

    Raises:
        UserError: A step of the Performer cannot be timed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan_file, before = folder / "plan.json", folder / "plan-before.json"
    if is_first_process() and plan_file.exists():
        costs = [entry["cost"] for entry in read_json(plan_file).values()]
        if any(cost["failure"] for cost in costs):
            plan_file.replace(before)
    # Or the others could still read the plan that is to be made anew.
    _wait_for_everyone()
    if is_first_process() and not plan_file.exists():
        earlier = read_json(before) if before.exists() else {}
        write_json(plan_file, _plan(options, data, earlier, report))
        before.unlink(missing_ok=True)
    wait_for(plan_file)
    plan = read_json(plan_file)
    for name, entry in plan.items():
        if entry["options"] is None:
            continue
        own = folder / name
        chosen = TrainingOptions(**entry["options"])

        def log(done: int, total: int, values: Mapping[str, float], name: str = name) -> None:
            if report is not None:
                report(f"training {name} on long rows", done, total, values)

        trained = train_once(data, chosen, own, log)
        file = own / "result.json"
        if file.exists():
            continue
        if not is_first_process():
            wait_for(file)
            continue
        scores = _score(own, chosen, data, report)
        write_json(file, {**entry, "scores": scores, "seconds": trained["seconds"], "name": name})


def _plan(
    options: TrainingOptions, data: StudyData, earlier: Mapping[str, Any], report: Report | None
) -> dict[str, Any]:
    """Options and cost of a step of each model; no options where the model cannot be trained.

    What an earlier plan has measured stands, for models may have been trained by it.
    """
    row = data.row(options.max_length)
    exact = replace(options, attention="exact", num_features=None)

    def cost(number: int, name: str, given: TrainingOptions) -> dict[str, Any]:
        if name in earlier and not earlier[name]["cost"]["failure"]:
            return dict(earlier[name]["cost"])
        if report is not None:
            report("timing steps on long rows", number, 3, {})
        return asdict(measure_cost(given, row, backward=True))

    performer = cost(0, "performer", options)
    if performer["failure"]:
        raise UserError(
            f"a step of the Performer on {len(row):,} tokens could not be timed "
            f"({performer['failure']}); end what else runs here, or take the study to a larger "
            "machine, and repeat the command with --resume"
        )
    same = cost(1, "transformer", exact)
    plan: dict[str, Any] = {"performer": {"options": options.to_dict(), "cost": performer}}
    for name, given, measured in _transformers(exact, performer, same, cost):
        steps = None
        if measured["seconds"]:
            steps = max(1, round(options.steps * performer["seconds"] / measured["seconds"]))
        plan[name] = {
            "options": None if steps is None else _with_steps(given, steps).to_dict(),
            "cost": measured,
        }
    if report is not None:
        report("timing steps on long rows", 3, 3, {})
    return plan


def _transformers(
    exact: TrainingOptions,
    performer: dict[str, Any],
    same: dict[str, Any],
    cost: Callable[[int, str, TrainingOptions], dict[str, Any]],
) -> list[tuple[str, TrainingOptions, dict[str, Any]]]:
    found = [("transformer", exact, same)]
    share = performer["seconds"] / same["seconds"] if same["seconds"] else 0.0
    layers = max(1, int(share * exact.num_layers))
    if layers < exact.num_layers:
        name, fewer = f"transformer-{layers}-layers", replace(exact, num_layers=layers)
        found.append((name, fewer, cost(2, name, fewer)))
    return found


def _with_steps(options: TrainingOptions, steps: int) -> TrainingOptions:
    share = steps / options.steps
    scaled: dict[str, Any] = {
        name: None if value is None else max(1, round(value * share))
        for name in ("warmup_steps", "eval_steps", "save_steps")
        for value in [getattr(options, name)]
    }
    return replace(options, steps=steps, **scaled)


def _score(
    folder: Path, options: TrainingOptions, data: StudyData, report: Report | None
) -> dict[str, Any]:
    model, tokenizer = load_model(folder)
    scores = {}
    for number, (split, records) in enumerate(data.scored.items()):
        if report is not None:
            report(f"scoring {folder.name} on long rows", number, len(data.scored), {})
        tokens = encode_sequences(tokenizer, [record.sequence for record in records])
        order = np.random.default_rng(0).permutation(len(tokens))
        rows = pack_sequences([tokens[index] for index in order], options.max_length)
        # The last is short, and would be scored with less context.
        dataset = TokenDataset(rows[: min(_MOST_ROWS, max(1, len(rows) - 1))])
        scores[split] = evaluate_rows(
            model, tokenizer, dataset, batch_tokens=options.max_length, across_sequences=True
        )
    return scores


def measure_contexts(
    options: TrainingOptions,
    lengths: Sequence[int],
    longest_exact: int,
    data: StudyData,
    folder: Path,
    report: Report | None = None,
) -> None:
    """Time and memory of a forward pass over proteins one after another, against length.

    Args:
        options: Of the model; run as ``favor-relu``, ``favor-softmax``, ``exact`` and
            ``identity``.
        lengths: Tokens.
        longest_exact: Longest at which exact attention is measured.
        data: Whose training proteins are concatenated; see ``StudyData.row``.
        folder: Where ``contexts.json`` is; what it has is kept, what failed is tried again.
        report: Called with what is being done, how much of it is done, how much there is, and a
            log entry.
    """
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
        if report is not None:
            report("forward against length", number, len(wanted), {})
        found = rows.get((attention, length))
        if found is not None and not found["failure"]:
            continue
        features = options.num_features if attention.startswith("favor") else None
        own = replace(
            options,
            attention=attention,
            num_features=features,
            max_length=max(lengths),
            batch_tokens=max(lengths),
        )
        cost = measure_cost(own, data.row(length), backward=False)
        rows[attention, length] = {"attention": attention, "length": length, **asdict(cost)}
        write_json(file, {"rows": list(rows.values())})
    if report is not None:
        report("forward against length", len(wanted), len(wanted), {})


def _wait_for_everyone() -> None:
    if process_count() > 1:
        PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()
