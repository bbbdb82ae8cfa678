"""Forward passes and decoding of a converted model against its original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performers.app.options import Declaration
from performers.benchmark.case import Case, Group, Ratio, Row, add_ratios
from performers.benchmark.cases.decode import ModelDecoder, keeps_logits, stepping
from performers.benchmark.gate import check_finite
from performers.benchmark.measure import measure_group
from performers.benchmark.memory import Peak, peak_of
from performers.benchmark.settings import Rounds, Sampling
from performers.benchmark.timing import threads_of_torch
from performers.convert.families.base import without_cache
from performers.convert.interface.positions import learned_positions

ORIGINAL, CONVERTED = "original", "converted"
SPEED = Sampling(repeats=5, min_time=0.2)
DECODING = Rounds(repeats=5, min_time=0.2)
"""Default repetitions of a forward pass and of a run of steps."""

_CHECKED_LENGTH, _WARM_UP_LENGTH = 32, 64


def measure_speed(
    original: Any,
    converted: Any,
    lengths: Sequence[int],
    *,
    sampling: Sampling = SPEED,
    seed: int = 0,
    folders: tuple[Path, Path] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Time the full forward pass of two models on the same random tokens, in turns.

    Of a causal model with a language-modelling head the logits of the last token alone are
    computed, as in reading a prompt. A call that is predicted to be too long is skipped.

    Args:
        original: A transformers model.
        converted: The same, converted.
        lengths: Tokens, rising.
        sampling: Repetitions, duration, and whether memory is measured.
        seed: Seed of the tokens and of the order of turns.
        folders: Folders of the two saved models, for their peak memory, which is measured in
            processes of its own; None: it is not measured.
        progress: Called with how many lengths of how many are done.

    Returns:
        A row for each length and model: ``length``, ``model``, ``status``, ``reason``, ``seconds``
        (median) and quartiles, ``peak_bytes`` above the resident model, ``original_ratio`` (the
        original's time over this one's).

    Raises:
        ValueError: The lengths do not rise, or exceed a model's learned positions.
    """
    models = {ORIGINAL: original, CONVERTED: converted}
    _check_lengths("lengths", lengths, models, 0)
    saved = dict(zip(models, map(str, folders or ()), strict=False))
    rows: list[Row] = []
    with threads_of_torch(sampling.threads) as threads:
        for done, length in enumerate(lengths):
            tokens = cache(partial(_tokens, original, length, seed))
            cases = [
                Case(
                    {"model": name},
                    partial(_prepare, model, tokens),
                    probe=partial(measure_peak, saved[name], name == CONVERTED, length, seed)
                    if saved
                    else None,
                    ours=name == CONVERTED,
                    growth=2 if name == ORIGINAL else 1,
                )
                for name, model in models.items()
            ]
            group = Group({"length": length}, cases)
            rows += measure_group(group, sampling, threads=threads, seed=seed, shorter=rows)
            progress(done + 1, len(lengths))
    add_ratios(rows, [Ratio("original_ratio", _is_original, ("length",))])
    return rows


def measure_decoding(
    original: Any,
    converted: Any,
    contexts: Sequence[int],
    *,
    tokens: int = 16,
    rounds: Rounds = DECODING,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Time decoding steps after contexts of several lengths, and measure the size of the cache.

    Both models and all contexts take turns, because it is their ratios that matter. The converted
    model reads each context. The original, which would need quadratic time to do so, reads its
    beginning and repeats its keys and values; see `ModelDecoder`.

    Arguments are as of `measure_speed`, with ``contexts``, the tokens in the cache before the
    steps, for ``lengths``, and the number of steps in a timed call, ``tokens``. Progress counts the
    contexts that are read; the steps come last.

    Returns:
        A row for each context and model: ``context``, ``model``, ``status``, ``reason``,
        ``seconds`` a token (median) and quartiles, ``cache_bytes``, ``original_ratio`` (the
        original's time over this one's), ``over_shortest_context`` (its time over its own after
        the shortest context).

    Raises:
        ValueError: The contexts do not rise, or exceed a model's learned positions.
    """
    Declaration(help="", at_least=1).check("tokens", tokens)
    models = {ORIGINAL: original, CONVERTED: converted}
    # Steps of a model whose cache cannot be taken back go on from where the last ones ended.
    _check_lengths("contexts", contexts, models, tokens)
    cases, sizes = [], []
    with threads_of_torch(rounds.threads) as threads:
        readers = {
            name: ModelDecoder(model, 1, seed, repeat=name == ORIGINAL)
            for name, model in models.items()
        }
        for done, context in enumerate(contexts):
            for name, reader in readers.items():
                reader.extend(context)
                sizes.append(reader.nbytes)
                cases.append(
                    Case(
                        {"context": context, "model": name},
                        partial(stepping, reader.fork(), tokens),
                        ours=name == CONVERTED,
                        units=tokens,
                    )
                )
            progress(done + 1, len(contexts))
        rows = measure_group(Group({}, cases), rounds, threads=threads, seed=seed)
    for row, size in zip(rows, sizes, strict=True):
        row["cache_bytes"] = size
    add_ratios(
        rows,
        [
            Ratio("original_ratio", _is_original, ("context",)),
            Ratio("over_shortest_context", lambda row: True, ("model",), over_base=True),
        ],
    )
    return rows


def forward_call(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that runs a transformers model on tokens (B, L) and returns its first output."""
    options: dict[str, Any] = without_cache(model)
    if keeps_logits(model):
        options["logits_to_keep"] = 1

    def call() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(input_ids=tokens, **options)[0]
        return output

    return call


def measure_peak(folder: str, converted: bool, length: int, seed: int) -> Peak:
    """Peak memory of a forward pass of a saved model; runs in a separate process."""
    from performers.convert import extend_positions_, load_performer
    from performers.convert.distillation.pretrained import load_model

    model = load_performer(folder) if converted else load_model(folder).model
    extend_positions_(model, length)
    tokens = _tokens(model, length, seed)
    forward_call(model, tokens[:, :_WARM_UP_LENGTH])()
    return peak_of(forward_call(model, tokens))


def _is_original(row: Row) -> bool:
    return bool(row["model"] == ORIGINAL)


def _check_lengths(name: str, lengths: Sequence[int], models: dict[str, Any], more: int) -> None:
    Declaration(help="", rising=True).check(name, tuple(lengths))
    for which, model in models.items():
        limit = learned_positions(model)
        if limit is not None and lengths[-1] + more > limit:
            raise ValueError(
                f"{name} reach {lengths[-1]}, and the {which} model has {limit} positions: give "
                "it more with performers.convert.extend_positions_"
            )


def _prepare(model: Any, tokens: Callable[[], Tensor]) -> Callable[[], object]:
    model.eval()
    output = forward_call(model, tokens()[:, :_CHECKED_LENGTH])()
    check_finite(f"the output of {type(model).__name__}", output)
    return forward_call(model, tokens())


def _tokens(model: Any, length: int, seed: int) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    # A token that stands for padding would change the positions of some models.
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None:
        tokens = tokens.masked_fill(tokens == padding, (padding + 1) % vocabulary)
    return tokens.to(model.device)
