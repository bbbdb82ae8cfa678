"""What decoding keeps of its context: a state of fixed size, or all keys and values."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from performers import FavorState, favor_attention, use_backend
from performers.benchmark.checking import TOLERANCES, judge
from performers.benchmark.steps import Shape
from performers.benchmark.workload import Inputs, Workload

EXACT = "exact KV cache"
_PREFILL = 4096
_CHECKED_CONTEXT, _CHECKED_TOKENS = 150, 3


class Decoder(Protocol):
    """Reads a context once, then a token at a time."""

    def extend(self, context: int) -> None:
        """Read on until the context has that many tokens."""

    def begin(self, tokens: int) -> None:
        """Go back to the end of the context, with room for so many tokens more; nearly free."""

    def step(self) -> Tensor:
        """Read one more token; returns its output."""

    @property
    def nbytes(self) -> int:
        """Bytes kept of the context."""


class _Layer:
    """Random queries, keys and values of one attention layer, the same for every decoder."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._token = workload.inputs(1)
        self._context = 0

    def _pieces(self, context: int) -> Iterator[Inputs]:
        """The tokens up to a context, a few thousand at a time."""
        while self._context < context:
            length = min(_PREFILL, context - self._context)
            yield replace(self._workload, seed=self._workload.seed + self._context).inputs(length)
            self._context += length


class FavorDecoder(_Layer):
    """One layer of our attention, which keeps a ``FavorState``.

    Args:
        workload: Shapes.
        backend: The backend that reads and steps.
    """

    def __init__(self, workload: Workload, backend: str) -> None:
        super().__init__(workload)
        self._backend = backend
        self._feature_map = workload.feature_map()
        self._read: FavorState | None = None
        self._state: FavorState | None = None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, state: FavorState | None
    ) -> tuple[Tensor, FavorState]:
        return favor_attention(
            query,
            key,
            value,
            self._feature_map,
            is_causal=True,
            state=state,
            return_state=True,
            backend=self._backend,
        )

    def extend(self, context: int) -> None:
        """See ``Decoder``."""
        for query, key, value, _ in self._pieces(context):
            _, self._read = self._attend(query, key, value, self._read)

    def begin(self, tokens: int) -> None:
        """See ``Decoder``."""
        self._state = self._read

    def step(self) -> Tensor:
        """See ``Decoder``."""
        query, key, value, _ = self._token
        out, self._state = self._attend(query, key, value, self._state)
        return out

    @property
    def nbytes(self) -> int:
        """See ``Decoder``."""
        return 0 if self._read is None else self._read.nbytes


class ExactDecoder(_Layer):
    """One layer of softmax attention, which keeps every key and value.

    Memory for the tokens to come is there beforehand, the best case for a cache: no step copies
    the past.

    Args:
        workload: Shapes.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        shape = (workload.batch, workload.heads, 0, workload.head_dim)
        self._keys = torch.empty(shape, dtype=workload.torch_dtype)
        self._values = torch.empty(shape, dtype=workload.torch_dtype)
        self._length = 0

    def extend(self, context: int) -> None:
        """See ``Decoder``."""
        self._reserve(context)
        for _, key, value, _ in self._pieces(context):
            start, stop = self._context, self._context + key.shape[2]
            self._keys[:, :, start:stop], self._values[:, :, start:stop] = key, value

    def begin(self, tokens: int) -> None:
        """See ``Decoder``."""
        if self._keys.shape[2] < self._context + tokens:
            self._reserve(self._context + tokens)
        self._length = self._context

    def step(self) -> Tensor:
        """See ``Decoder``."""
        query, key, value, _ = self._token
        now, self._length = self._length, self._length + 1
        self._keys[:, :, now : now + 1], self._values[:, :, now : now + 1] = key, value
        return F.scaled_dot_product_attention(
            query, self._keys[:, :, : now + 1], self._values[:, :, : now + 1]
        )

    @property
    def nbytes(self) -> int:
        """See ``Decoder``."""
        head = self._keys[:1, :1, :1].nbytes + self._values[:1, :1, :1].nbytes
        return self._workload.batch * self._workload.heads * self._context * head

    def _reserve(self, length: int) -> None:
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty((*old.shape[:2], length, old.shape[3]))
            new[:, :, : self._context] = old[:, :, : self._context]
            setattr(self, name, new)


class ModelDecoder:
    """The paper's regular causal model with its cache, untrained.

    Linear attention reads the context. For exact attention, which would take hours to do so, random
    keys and values are put into the cache: what a token costs does not depend on what they hold.

    Args:
        shape: The model; its objective is causal.
        attention: See ``PerformerConfig.attention``.
    """

    def __init__(self, shape: Shape, attention: str) -> None:
        from performers.models import PerformerCache

        self._model = shape.model(attention).eval()
        self._shape = shape
        config = self._model.config
        self._cache = PerformerCache(attention, config.num_hidden_layers)
        self._heads = config.num_attention_heads
        self._head_dim = config.head_dim
        self._exact = attention == "exact"
        self._token = shape.tokens(1)[0]
        self._context = self._stepped = 0

    @torch.no_grad()
    def extend(self, context: int) -> None:
        """See ``Decoder``."""
        self.begin(0)
        while self._context < context:
            length = min(_PREFILL, context - self._context)
            self._context += length
            if self._exact:
                self._cache.extend(torch.ones(self._shape.batch, length, dtype=torch.bool))
                for layer in self._cache.layers:
                    size = (2, self._shape.batch, self._heads, length, self._head_dim)
                    layer.update(*torch.randn(size))
            else:
                self._forward(self._shape.tokens(length)[0])

    def begin(self, tokens: int) -> None:
        """See ``Decoder``; a state, whose size is fixed, keeps the tokens stepped through."""
        if self._exact and self._stepped:
            self._cache.crop(-self._stepped)
        self._stepped = 0

    @torch.no_grad()
    def step(self) -> Tensor:
        """See ``Decoder``."""
        self._stepped += 1
        return self._forward(self._token)

    @property
    def nbytes(self) -> int:
        """See ``Decoder``."""
        return self._cache.nbytes

    def _forward(self, tokens: Tensor) -> Tensor:
        return self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits


def check_decoder(actual: Decoder, expected: Decoder, dtype: str) -> None:
    """Compare prefill and steps of a decoder with those of another.

    Args:
        actual: The decoder, new.
        expected: The same on ``backend="reference"``, which is forced where it names none.
        dtype: A key of ``TOLERANCES``.

    Raises:
        WrongResultError: They differ.
    """

    def run(decoder: Decoder) -> list[Tensor]:
        decoder.extend(_CHECKED_CONTEXT)
        decoder.begin(_CHECKED_TOKENS)
        return [decoder.step() for _ in range(_CHECKED_TOKENS)]

    results = run(actual)
    with use_backend("reference"):
        right = run(expected)
    for number, (result, wanted) in enumerate(zip(results, right, strict=True)):
        part = f"output of token {number + 1} after the context"
        judge(part, result, wanted, tuple(wanted.shape), TOLERANCES[dtype])
