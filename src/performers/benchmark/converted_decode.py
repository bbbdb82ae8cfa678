"""Decoding with a converted model against its original: time per token and bytes of the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from performers.benchmark.converted import CONVERTED, ORIGINAL, keeps_logits
from performers.benchmark.groups import Entry, measure_group
from performers.benchmark.results import Row, outcome_columns, ratio
from performers.benchmark.settings import Rounds
from performers.benchmark.threads import threads_of_torch
from performers.benchmark.workload import at_least, rising
from performers.convert.interface.positions import learned_positions
from performers.models import PerformerCache
from performers.models.arguments import cache_keyword

__all__ = ["DECODING", "measure_decoding"]

DECODING = Rounds(repeats=5, min_time=0.2)
"""How often a run of steps is timed where nothing else is said."""

# Tokens of the context that are read in one call.
_PREFILL = 1024
# Exact attention reads so much of its context; the rest of its keys and values repeat these.
_REALLY_READ = 64


def measure_decoding(
    original: Any,
    converted: Any,
    contexts: Sequence[int],
    *,
    tokens: int = 16,
    rounds: Rounds = DECODING,
    batch_size: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Time decoding steps after contexts of several lengths, and weigh the cache.

    Both models and all contexts take turns, because it is their ratios that matter. The converted
    model reads each context. The original, which would need quadratic time to do so, reads its
    beginning, and its cache is filled up with these keys and values again: what a step costs does
    not depend on what they hold. Where the original's cache is of a kind that cannot be filled so,
    it reads the context too.

    Args:
        original: A causal transformers model.
        converted: The same, converted.
        contexts: Tokens in the cache before the steps, rising.
        tokens: Steps in a timed call.
        rounds: How often.
        batch_size: Sequences.
        seed: Of the tokens and of the order of turns.
        progress: Called with how many contexts of how many are read; the steps come last.

    Returns:
        A row for each context and model: ``context``, ``model``, ``status``, ``reason``,
        ``seconds`` a token (median) and quartiles, ``cache_bytes``, ``original_ratio`` (the
        original's time over this one's), ``over_shortest_context`` (its time over its own after
        the shortest context).

    Raises:
        ValueError: The contexts do not rise, or exceed a model's learned positions.
    """
    contexts = tuple(contexts)
    rising("contexts", contexts)
    at_least("tokens", tokens, 1)
    models = {ORIGINAL: original, CONVERTED: converted}
    for name, model in models.items():
        limit = learned_positions(model)
        # Steps of a model whose cache cannot be taken back go on from where the last ones ended.
        if limit is not None and contexts[-1] + tokens > limit:
            raise ValueError(
                f"contexts reach {contexts[-1]}, and the {name} model has {limit} positions: give "
                "it more with performers.convert.extend_positions_"
            )
    sizes: dict[tuple[int, str], int] = {}
    entries = []
    with threads_of_torch(rounds.threads) as threads:
        readers = {name: _Reader(model, batch_size, seed) for name, model in models.items()}
        for done, context in enumerate(contexts):
            for name, reader in readers.items():
                decoder = reader.read(context, pretend=name == ORIGINAL)
                sizes[context, name] = decoder.nbytes
                entries.append(
                    Entry(f"{context} {name}", _prepare(decoder, tokens), ours=name == CONVERTED)
                )
            progress(done + 1, len(contexts))
        outcomes = measure_group(entries, rounds, threads=threads, seed=seed)
    rows = []
    for (context, name), size in sizes.items():
        outcome = outcomes[f"{context} {name}"]
        row: Row = {"context": context, "model": name, **outcome_columns(outcome)}
        for column in ("seconds", "first_quartile", "third_quartile", "fastest"):
            if row[column] is not None:
                row[column] /= tokens
        del row["peak_bytes"], row["peak_method"]
        rows.append({**row, "cache_bytes": size})
    _add_ratios(rows)
    return rows


class _Reader:
    """Reads on from context to context, and leaves a decoder at each.

    Args:
        model: A causal model.
        batch_size: Sequences.
        seed: Of the tokens.
    """

    def __init__(self, model: Any, batch_size: int, seed: int) -> None:
        self._model, self._batch = model.eval(), batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._cache: Any = None
        self._length = 0

    def read(self, context: int, *, pretend: bool) -> _Decoder:
        """The decoder after a context that is longer than the last one."""
        while self._length < context:
            limit = _REALLY_READ if pretend and not self._length else _PREFILL
            length = min(limit, context - self._length)
            tokens = self._tokens(length)
            self._cache = _forward(self._model, tokens, self._cache)[1]
            self._length += length
            if pretend and _fill(self._cache, self._length, context):
                self._length = context
        cache = copy.deepcopy(self._cache)
        return _Decoder(self._model, cache, self._tokens(1), context)

    def _tokens(self, length: int) -> Tensor:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        tokens = torch.randint(vocabulary, (self._batch, length), generator=self._generator)
        return tokens.to(self._model.device)


class _Decoder:
    """A model with a cache that has read a context."""

    def __init__(self, model: Any, cache: Any, token: Tensor, context: int) -> None:
        self._model, self._cache = model, cache
        self._token, self._context = token, context

    @property
    def nbytes(self) -> int:
        """Bytes that the cache keeps of the context."""
        return sum(_layer_bytes(layer) for layer in self._cache.layers)

    def step(self) -> Tensor:
        """Read one more token; returns the logits."""
        logits, self._cache = _forward(self._model, self._token, self._cache)
        return logits

    def back(self) -> None:
        """Keys and values end with the context again; a state, whose size is fixed, goes on."""
        cache = self._cache
        if isinstance(cache, PerformerCache):
            if cache.keeps_keys and (steps := cache.get_seq_length() - self._context):
                cache.crop(-steps)
            return
        for layer in cache.layers:
            if type(layer) is DynamicLayer and layer.keys is not None:
                layer.keys = layer.keys[:, :, : self._context]
                layer.values = layer.values[:, :, : self._context]


def _prepare(decoder: _Decoder, tokens: int) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        def call() -> None:
            decoder.back()
            for _ in range(tokens):
                decoder.step()

        return call

    return prepare


@torch.no_grad()
def _forward(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    options = {"logits_to_keep": 1} if keeps_logits(model) else {}
    name = cache_keyword(model.forward)
    output = model(input_ids=tokens, use_cache=True, **{name: cache}, **options)
    return output[0], output[name]


def _fill(cache: Any, length: int, context: int) -> bool:
    """Repeat keys and values up to a context; False where a layer is of another kind."""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    index = torch.arange(context) % length
    if isinstance(cache, PerformerCache):
        batch = cache.layers[0].keys.shape[0]
        cache.extend(torch.ones(batch, context - length, dtype=torch.bool))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
    return True


def _layer_bytes(layer: Any) -> int:
    nbytes = getattr(layer, "nbytes", None)
    if nbytes is not None:
        return int(nbytes)
    state = getattr(layer, "state", None)
    if state is not None:
        return int(state.nbytes)
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _add_ratios(rows: list[Row]) -> None:
    exact = {row["context"]: row["seconds"] for row in rows if row["model"] == ORIGINAL}
    shortest: dict[str, float | None] = {}
    for row in rows:
        first = shortest.setdefault(row["model"], row["seconds"])
        row["original_ratio"] = ratio(exact[row["context"]], row["seconds"])
        row["over_shortest_context"] = ratio(row["seconds"], first)
