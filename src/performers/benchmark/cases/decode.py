"""Time per token and bytes of state against the length of the context."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from performers import FavorState, backends, favor_attention, use_backend
from performers.benchmark.case import Benchmark, Case, Column, Group, Ratio, Row
from performers.benchmark.cases.inputs import Inputs, dtype_of, make_features, make_inputs
from performers.benchmark.cases.model import make_model
from performers.benchmark.gate import TOLERANCES, Gate, judge
from performers.benchmark.settings import DecodeSettings, Shape, Workload
from performers.benchmark.table import nbytes, seconds, times
from performers.models import PerformerCache
from performers.models.arguments import cache_keyword

EXACT = "exact KV cache"
_MODELS = ("favor-softmax", "exact")
# Tokens of the context that are read in one call.
_PREFILL, _MODEL_PREFILL = 4096, 1024
# Exact attention reads so much of its context; the rest of its keys and values repeat these.
_REALLY_READ = 64
_CHECKED_CONTEXT, _CHECKED_TOKENS = 150, 3


class Decoder(Protocol):
    """Reads a context once, then a token at a time."""

    def extend(self, context: int) -> None:
        """Read on until the context has that many tokens."""

    def steps(self, tokens: int) -> Iterator[Tensor]:
        """Outputs of so many tokens more, read one by one; always from the end of the context."""

    @property
    def nbytes(self) -> int:
        """Bytes kept of the context."""


class _Layer(Decoder):
    """Random queries, keys and values of one attention layer, the same for every decoder."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._token = make_inputs(workload, 1)
        self._context = 0

    def _pieces(self, context: int) -> Iterator[Inputs]:
        """The tokens up to a context, a few thousand at a time."""
        while self._context < context:
            length = min(_PREFILL, context - self._context)
            yield make_inputs(self._workload, length, offset=self._context)
            self._context += length


class FavorDecoder(_Layer):
    """One layer of linear attention, which keeps a ``FavorState``."""

    def __init__(self, workload: Workload, backend: str) -> None:
        super().__init__(workload)
        self._attend = partial(
            favor_attention,
            feature_map=make_features(workload),
            is_causal=True,
            return_state=True,
            backend=backend,
        )
        self._state: FavorState | None = None

    def extend(self, context: int) -> None:
        """See ``Decoder``."""
        for query, key, value, _ in self._pieces(context):
            _, self._state = self._attend(query, key, value, state=self._state)

    def steps(self, tokens: int) -> Iterator[Tensor]:
        """See ``Decoder``."""
        state = self._state
        for _ in range(tokens):
            out, state = self._attend(*self._token[:3], state=state)
            yield out

    @property
    def nbytes(self) -> int:
        """See ``Decoder``."""
        return 0 if self._state is None else self._state.nbytes


class ExactDecoder(_Layer):
    """One layer of softmax attention, which keeps every key and value.

    Memory for the tokens to come is allocated beforehand, the best case for a cache: no step copies
    the past.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        shape = (2, workload.batch, workload.heads, 0, workload.head_dim)
        self._kept = torch.empty(shape, dtype=dtype_of(workload))

    def extend(self, context: int) -> None:
        """See ``Decoder``."""
        self._reserve(context)
        for _, key, value, _ in self._pieces(context):
            self._keep(self._context, key, value)

    def steps(self, tokens: int) -> Iterator[Tensor]:
        """See ``Decoder``."""
        query, key, value, _ = self._token
        self._reserve(self._context + tokens)
        for place in range(self._context, self._context + tokens):
            self._keep(place, key, value)
            keys, values = self._kept[:, :, :, : place + 1]
            yield F.scaled_dot_product_attention(query, keys, values)

    @property
    def nbytes(self) -> int:
        """See ``Decoder``."""
        return self._kept[:, :, :, : self._context].nbytes

    def _keep(self, place: int, key: Tensor, value: Tensor) -> None:
        here = slice(place, place + key.shape[2])
        self._kept[0, :, :, here], self._kept[1, :, :, here] = key, value

    def _reserve(self, length: int) -> None:
        """Make room for so many tokens, where there is less."""
        if self._kept.shape[3] >= length:
            return
        new = self._kept.new_empty((*self._kept.shape[:3], length, self._kept.shape[4]))
        new[:, :, :, : self._context] = self._kept[:, :, :, : self._context]
        self._kept = new


class ModelDecoder(Decoder):
    """A causal transformers model with its cache.

    Args:
        model: The model.
        batch_size: Sequences.
        seed: Seed of the tokens.
        repeat: Read the beginning of the first context and fill the cache with its keys and values
            again, where the cache allows: exact attention would need quadratic time to read, and
            the cost of a step does not depend on these values.
    """

    def __init__(self, model: Any, batch_size: int, seed: int, *, repeat: bool = False) -> None:
        self._model, self._batch, self._repeat = model.eval(), batch_size, repeat
        self._generator = torch.Generator().manual_seed(seed)
        self._cache: Any = None
        self._context = 0
        self._token = self._draw(1)

    def extend(self, context: int) -> None:
        """See ``Decoder``."""
        self._take_back()
        while self._context < context:
            limit = _REALLY_READ if self._repeat and not self._context else _MODEL_PREFILL
            length = min(limit, context - self._context)
            self._forward(self._draw(length))
            self._context += length
            if self._repeat and _fill(self._cache, self._context, context):
                self._context = context

    def steps(self, tokens: int) -> Iterator[Tensor]:
        """See ``Decoder``; a state, whose size is fixed, keeps the tokens stepped through."""
        self._take_back()
        for _ in range(tokens):
            yield self._forward(self._token)

    @property
    def nbytes(self) -> int:
        """See ``Decoder``."""
        return sum(_layer_bytes(layer) for layer in self._cache.layers)

    def fork(self) -> ModelDecoder:
        """A decoder with a copy of the cache."""
        forked = copy.copy(self)
        forked._cache = copy.deepcopy(self._cache)
        return forked

    def _take_back(self) -> None:
        """Remove the tokens stepped through from the cache, where it keeps each."""
        cache = self._cache
        if isinstance(cache, PerformerCache):
            if cache.keeps_keys and (steps := cache.get_seq_length() - self._context):
                cache.crop(-steps)
            return
        for layer in cache.layers if cache is not None else ():
            if type(layer) is DynamicLayer and layer.keys is not None:
                layer.keys = layer.keys[:, :, : self._context]
                layer.values = layer.values[:, :, : self._context]

    @torch.no_grad()
    def _forward(self, tokens: Tensor) -> Tensor:
        options = {"logits_to_keep": 1} if keeps_logits(self._model) else {}
        name = cache_keyword(self._model.forward)
        options |= {name: self._cache}
        output = self._model(input_ids=tokens, use_cache=True, **options)
        self._cache = output[name]
        logits: Tensor = output[0]
        return logits

    def _draw(self, length: int) -> Tensor:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        tokens = torch.randint(vocabulary, (self._batch, length), generator=self._generator)
        return tokens.to(self._model.device)


def keeps_logits(model: Any) -> bool:
    """True where a transformers model can be told for how many tokens to compute logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def stepping(decoder: Decoder, tokens: int) -> Callable[[], None]:
    """A call of so many steps from the end of the context."""

    def call() -> None:
        for _ in decoder.steps(tokens):
            pass

    return call


def _fill(cache: Any, length: int, context: int) -> bool:
    """Repeat keys and values up to a context; False where a layer is of another kind."""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    if length == context:
        return True
    index = torch.arange(context) % length
    if isinstance(cache, PerformerCache):
        batch = cache.layers[0].keys.shape[0]
        cache.extend(torch.ones(batch, context - length, dtype=torch.bool))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
    return True


def _layer_bytes(layer: Any) -> int:
    for one in (layer, getattr(layer, "state", None)):
        if (size := getattr(one, "nbytes", None)) is not None:
            return int(size)
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def check(actual: Callable[[], Decoder], expected: Callable[[], Decoder], dtype: str) -> None:
    """Compare steps of a decoder with those of another, on the reference backend if it names none.

    Raises:
        WrongResultError: The results differ by more than the tolerance.
    """

    def run(decoder: Decoder) -> list[Tensor]:
        decoder.extend(_CHECKED_CONTEXT)
        return list(decoder.steps(_CHECKED_TOKENS))

    results = run(actual())
    with use_backend("reference"):
        right = run(expected())
    for number, (result, wanted) in enumerate(zip(results, right, strict=True)):
        judge(f"output of token {number + 1} after the context", result, wanted, TOLERANCES[dtype])


def _groups(settings: DecodeSettings, notes: dict[str, Any]) -> list[Group]:
    """One layer with all contexts in turns, because their ratio matters; models one by one.

    Of models only one of a kind fits in memory: they read on from context to context.
    """
    layers: dict[str, Callable[[], Decoder]] = {
        f"performers {name}": partial(FavorDecoder, settings, name)
        for name in backends()
        if name != "reference"
    }
    reference = partial(FavorDecoder, settings, "reference")
    gates = {
        name: Gate(partial(check, make, reference, settings.dtype)) for name, make in layers.items()
    }
    layers[EXACT] = partial(ExactDecoder, settings)
    groups = [_group({"level": "layer"}, settings, settings.contexts, layers, gates)]
    if settings.through_model:
        shape = Shape(batch=settings.batch, num_features=settings.num_features, seed=settings.seed)
        models: dict[str, Callable[[], Decoder]] = {
            f"model {attention}": partial(_model_decoder, shape, attention) for attention in _MODELS
        }
        checked = f"model {_MODELS[0]}"
        gates[checked] = Gate(partial(check, models[checked], models[checked], settings.dtype))
        kept = {name: cache(make) for name, make in models.items()}
        groups += [
            _group({"level": "model", "context": context}, settings, (context,), kept, gates)
            for context in settings.contexts
        ]
    return groups


def _model_decoder(shape: Shape, attention: str) -> ModelDecoder:
    """The paper's regular causal model, untrained."""
    model = make_model(shape, attention)
    return ModelDecoder(model, shape.batch, shape.seed, repeat=attention == "exact")


def _group(
    key: Row,
    settings: DecodeSettings,
    contexts: tuple[int, ...],
    makers: Mapping[str, Callable[[], Decoder]],
    gates: dict[str, Gate],
) -> Group:
    sizes: dict[tuple[str, int], int] = {}

    def prepare(name: str, context: int) -> Callable[[], None]:
        decoder = makers[name]()
        decoder.extend(context)
        sizes[name, context] = decoder.nbytes
        return stepping(decoder, settings.tokens)

    def finish(rows: list[Row]) -> None:
        for row in rows:
            row["state_bytes"] = sizes.get((row["contestant"], row["context"]))

    cases = [
        Case(
            {"context": context, "contestant": name},
            partial(prepare, name, context),
            gate=gates.get(name),
            ours=name != EXACT,
            units=settings.tokens,
        )
        for context in contexts
        for name in makers
    ]
    return Group(key, cases, finish)


DECODE = Benchmark(
    name="decode",
    titles=("level",),
    title="decoding, {level}",
    across="context",
    series="contestant",
    columns=(
        Column("median", "seconds", seconds),
        Column("this / shortest\ncontext", "over_shortest_context", times),
        Column("exact\n/ this", "exact_ratio", times),
        Column("state", "state_bytes", nbytes),
    ),
    plotted=(("seconds", "seconds per token"), ("state_bytes", "state")),
    ratios=(
        Ratio("over_shortest_context", lambda row: True, ("level", "contestant"), over_base=True),
        Ratio("exact_ratio", lambda row: "exact" in row["contestant"], ("level", "context")),
    ),
    groups=_groups,
)
