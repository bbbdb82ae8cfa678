"""Forward passes of a converted model against its original, at rising lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performers.benchmark.checking import WrongResultError
from performers.benchmark.groups import SKIPPED, Entry, Predictor, measure_group
from performers.benchmark.results import Row, add_ratios, outcome_columns
from performers.benchmark.settings import Sampling
from performers.benchmark.threads import threads_of_torch
from performers.benchmark.workload import rising
from performers.convert.interface.positions import learned_positions

__all__ = [
    "CONVERTED",
    "ORIGINAL",
    "SPEED",
    "forward_call",
    "keeps_logits",
    "measure_speed",
    "probe_forward",
]

ORIGINAL, CONVERTED = "original", "converted"
SPEED = Sampling(repeats=5, min_time=0.2)
"""How often a forward pass is timed where nothing else is said."""

_CHECKED = 32


def measure_speed(
    original: Any,
    converted: Any,
    lengths: Sequence[int],
    *,
    sampling: Sampling = SPEED,
    batch_size: int = 1,
    seed: int = 0,
    folders: tuple[Path, Path] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Time the full forward pass of two models on the same random tokens, in turns.

    Both models take a turn in every round, so that a machine that slows down does so for both. Of
    a causal model with a language-modelling head the logits of the last token alone are computed,
    as in reading a prompt. A call that is predicted to be too long is skipped, and its row says so.

    Args:
        original: A transformers model.
        converted: The same, converted.
        lengths: Tokens, rising.
        sampling: How often, how long, and whether memory is measured.
        batch_size: Sequences in a call.
        seed: Of the tokens and of the order of turns.
        folders: Where the two models are saved, for their peak memory, which is measured in
            processes of its own; None: it is not measured.
        progress: Called with how many lengths of how many are done.

    Returns:
        A row for each length and model: ``length``, ``model``, ``status``, ``reason``, ``seconds``
        (median) and quartiles, ``peak_bytes`` above the resident model, ``original_ratio`` (the
        original's time over this one's).

    Raises:
        ValueError: The lengths do not rise, or exceed a model's learned positions.
    """
    lengths = tuple(lengths)
    rising("lengths", lengths)
    models = {ORIGINAL: original, CONVERTED: converted}
    for name, model in models.items():
        limit = learned_positions(model)
        if limit is not None and lengths[-1] > limit:
            raise ValueError(
                f"lengths reach {lengths[-1]}, and the {name} model has {limit} positions: give "
                "it more with performers.convert.extend_positions_"
            )
    predictor = Predictor(sampling.max_seconds)
    rows: list[Row] = []
    with threads_of_torch(sampling.threads) as threads:
        for done, length in enumerate(lengths):
            tokens = _tokens(original, batch_size, length, seed)
            entries = []
            for index, (name, model) in enumerate(models.items()):
                probe = None
                measured = sampling.memory and length <= sampling.memory_max_length
                if folders is not None and measured:
                    probe = _probe(folders[index], name, length, batch_size, seed)
                objection = predictor.objection(name, length, 2 if name == ORIGINAL else 1)
                entries.append(
                    Entry(
                        name,
                        _prepare(model, tokens),
                        probe,
                        ours=name == CONVERTED,
                        stopped=None if objection is None else (SKIPPED, objection),
                    )
                )
            outcomes = measure_group(entries, sampling, threads=threads, seed=seed)
            group: list[Row] = []
            for name, outcome in outcomes.items():
                if outcome.timing is not None:
                    predictor.learn(name, length, outcome.timing.median)
                group.append({"length": length, "model": name, **outcome_columns(outcome)})
            add_ratios(group, "model", {ORIGINAL: "original_ratio"}, "seconds")
            rows += group
            progress(done + 1, len(lengths))
    return rows


def keeps_logits(model: Any) -> bool:
    """Whether a model can be told for how many tokens to compute logits.

    Args:
        model: A transformers model.
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def forward_call(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that runs a model on tokens.

    Args:
        model: A transformers model.
        tokens: Token ids (B, L).

    Returns:
        The call; it returns the model's first output.
    """
    options: dict[str, Any] = {}
    if getattr(model.config, "use_cache", None):
        options["use_cache"] = False
    if keeps_logits(model):
        options["logits_to_keep"] = 1

    def call() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(input_ids=tokens, **options)[0]
        return output

    return call


def _prepare(model: Any, tokens: Tensor) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        model.eval()
        output = forward_call(model, tokens[:, :_CHECKED])()
        if not bool(torch.isfinite(output).all()):
            raise WrongResultError(f"{type(model).__name__} gives outputs that are not finite")
        return forward_call(model, tokens)

    return prepare


def _tokens(model: Any, batch_size: int, length: int, seed: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch_size, length), generator=generator)
    # A token that stands for padding would change the positions of some models.
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        tokens = tokens.masked_fill(tokens == padding, (padding + 1) % vocabulary)
    return tokens.to(model.device)


def _probe(folder: Path, name: str, length: int, batch_size: int, seed: int) -> dict[str, Any]:
    return {
        "kind": "forward",
        "folder": str(folder),
        "converted": name == CONVERTED,
        "length": length,
        "batch_size": batch_size,
        "seed": seed,
    }


def probe_forward(task: Mapping[str, Any], warm_up: int) -> Callable[[], object]:
    """The call whose memory ``performers.benchmark.probe`` measures: a model read from a folder.

    Args:
        task: See `measure_speed`.
        warm_up: Tokens of a call that is made before.

    Returns:
        The call.
    """
    from performers.convert import extend_positions_, load_performer
    from performers.convert.distillation.pretrained import load_model

    folder, length = task["folder"], task["length"]
    model = load_performer(folder) if task["converted"] else load_model(folder, head=None).model
    extend_positions_(model, length)
    tokens = _tokens(model, task["batch_size"], length, task["seed"])
    forward_call(model, tokens[:, :warm_up])()
    return forward_call(model, tokens)
