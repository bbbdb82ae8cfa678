"""Pretrained models with another attention in the place of their own, weights untouched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from performers.convert.distillation.pretrained import load_model
from performers.features.softmax import Estimator
from performers.models.context import AttentionContext
from performers.nn import Approximation
from performers.planning.exact import relative_error
from performers.planning.fits import Fits
from studies.accuracy.capture import (
    Attention,
    HeadSample,
    capture_heads,
    exact_attention,
    propagate,
)
from studies.parts import Part
from studies.passages import text_windows
from studies.sparse.attentions import LISTED, PATTERNS, SOFTMAX, WINDOW, mechanism, settings

FITTED = "Performer, fitted features and window"
ALL = (SOFTMAX, WINDOW, FITTED, LISTED, *PATTERNS)
"""Attentions that weights can be kept for: the others need queries that are keys, or training."""
_SINKS = 4


@dataclass(frozen=True)
class PretrainedSize:
    """Sizes of the measurements."""

    length: int = 512
    passages: int = 1
    keys: int = 64
    # Keys or features of a query for errors on heads, and more features for Performers alone.
    budgets: tuple[int, ...] = (16, 32, 64, 128, 256)
    counts: tuple[int, ...] = (512, 1024)
    layers: tuple[int, ...] = (0, 2, 5)
    draws: int = 3


class Pretrained:
    """A pretrained model and passages of text."""

    def __init__(self, path: str, calibration: Path, text: Path, size: PretrainedSize) -> None:
        self.size = size
        self._path, self._texts = path, (calibration, text)

    @cached_property
    def loaded(self) -> Any:
        """The model with its language-modelling head, where it has one."""
        return load_model(self._path)

    def _passages(self, text: int, count: int) -> Tensor:
        return text_windows(self.loaded.tokenizer, self._texts[text], self.size.length, count)

    @cached_property
    def _fits(self) -> dict[int, Fits]:
        samples = capture_heads(self.loaded, self._passages(0, 1))
        return {sample.layer: Fits(sample, sample.layer) for sample in samples}

    def approximation(self, name: str, keys: int) -> Approximation:
        """A Performer's features and exact keys, ``keys`` together."""
        causal = self.loaded.is_causal
        window, sinks = (keys // 2 if causal else keys // 4), (_SINKS if causal else 0)
        return {
            SOFTMAX: Approximation(keys),
            WINDOW: Approximation(keys // 2, window=window),
            FITTED: Approximation(keys // 2, "data_aware", window=window, sinks=sinks),
            LISTED: Approximation(
                keys // 4, "data_aware", window=window // 2, sinks=sinks, listed_keys=keys // 2
            ),
        }[name]

    def _attention(self, name: str) -> Attention:
        if name in PATTERNS:
            return pattern_attention(name, self.size.length, self.size.keys)
        chosen = self.approximation(name, self.size.keys)
        return _attending(
            {
                layer: fits.attention(chosen, fits.samples.query.shape[1])
                for layer, fits in self._fits.items()
            }
        )

    def measure(self, name: str) -> Part:
        """Cosine of final hidden states, and perplexities of a decoder (None for an encoder)."""
        rows = self._passages(1, self.size.passages)
        found = propagate(self.loaded, rows, self._attention(name))
        before, after = (found.original, found.replaced) if self.loaded.is_causal else (None, None)
        return {
            "cosine": found.cosine,
            "perplexity": after and after.perplexity,
            "original": before and before.perplexity,
        }

    @torch.no_grad()
    def errors(self, name: str) -> Part:
        """Squared relative errors of the outputs of heads against keys or features of a query.

        Returns:
            By number as text: the mean over layers and draws.
        """
        size = self.size
        tests = capture_heads(self.loaded, self._passages(1, 1), layers=size.layers)
        exact = [exact_attention(test) for test in tests]
        found: dict[str, float] = {}
        counts = size.budgets if name in PATTERNS else (*size.budgets, *size.counts)
        for keys in counts:
            errors = []
            for test, expected in zip(tests, exact, strict=True):
                for attention in self._drawn(name, keys, test):
                    errors.append(float(relative_error(attention(test), expected)) ** 2)
            found[str(keys)] = sum(errors) / len(errors)
        return found

    def _drawn(self, name: str, keys: int, test: HeadSample) -> list[Attention]:
        if name in PATTERNS:
            return [pattern_attention(name, self.size.length, keys)]
        fits, heads = self._fits[test.layer], test.query.shape[1]
        estimator: Estimator = "positive" if name == SOFTMAX else "data_aware"
        window = None if name == SOFTMAX else self.approximation(name, self.size.keys).window
        chosen = Approximation(keys, estimator, window=window)
        return [
            _attending({test.layer: fits.attention(chosen, heads, draw)})
            for draw in range(self.size.draws)
        ]


def _attending(modules: Mapping[int, nn.Module]) -> Attention:
    """The attention of the module of each layer."""
    return lambda x: modules[x.layer](x.query, x.key, x.value, **x.options)[0]


def pattern_attention(name: str, length: int, keys: int) -> Attention:
    """The attention of a pattern."""

    def attend(x: HeadSample) -> Tensor:
        heads, width = x.query.shape[1], x.query.shape[-1]
        setting = settings(length, keys, is_causal=x.is_causal)[name]
        module = mechanism(setting, heads, width, length, is_causal=x.is_causal)
        key, value = (y.repeat_interleave(heads // y.shape[1], dim=1) for y in (x.key, x.value))
        context = AttentionContext(x.is_causal, key_mask=x.key_mask)
        query = x.query * (x.scale * math.sqrt(width))
        out: Tensor = module(query, key, value, context, x.layer)[0]
        return out

    return attend
