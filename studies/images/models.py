"""Contestants of the study: one model, seven attentions, two kinds of positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import studies.comparators  # noqa: F401  (registers attentions)
from performers.models import PerformerConfig, PerformerForCausalLM
from performers.streams.images import BEGIN, VOCABULARY
from studies.training import look_back_


@dataclass(frozen=True)
class Size:
    """Numbers that the results depend on: options of the command, and those of the model.

    Attributes:
        size: Rows and columns of a picture.
        width: Width of the model, with its ``layers``, ``heads``, ``inner`` width of feed-forward
            blocks and random ``features`` a head.
        initial: Standard deviation of initial weights.
        warmup_steps: Steps to the peak learning rate.
    """

    size: int = 64
    seconds: float = 480.0
    scored: int = 100
    score_seconds: float = 60.0
    completions: int = 4
    seed: int = 0
    width: int = 32
    layers: int = 2
    heads: int = 2
    inner: int = 128
    features: int = 32
    initial: float = 0.04
    learning_rate: float = 1e-2
    warmup_steps: int = 5

    @property
    def length(self) -> int:
        """Values of a picture."""
        return 3 * self.size * self.size

    @property
    def line(self) -> int:
        """Values of a row of pixels."""
        return 3 * self.size


QUICK: dict[str, Any] = {
    "size": 8, "seconds": 0.3, "scored": 2, "score_seconds": 0.1, "completions": 1, "width": 16,
    "layers": 1, "inner": 16, "features": 8,
}  # fmt: skip
"""Changes of a size that runs in seconds."""

MOST_STEPS = 100_000
"""More than any limit of time allows."""


def contestants(size: Size) -> dict[str, dict[str, Any]]:
    """Options of ``PerformerConfig`` by name; windows and strides are a row of pixels."""
    line = size.line
    window = {"attention": "favor-softmax", "window": line}
    return {
        f"Performer, softmax, window {line}": window,
        "Performer, ReLU": {"attention": "favor-relu"},
        "Performer, softmax, regularised": {"attention": "favor-softmax", "regularized": True},
        f"Sparse Transformer, stride {line}": {
            "attention": "sparse",
            "attention_options": {"stride": line},
        },
        f"local, window {line}": {"attention": "local", "attention_options": {"window": line}},
        "Reformer": {"attention": "lsh"},
        "exact": {"attention": "exact"},
        f"Performer, softmax, window {line}, axial positions": {
            **window,
            "position_embedding": "axial",
            "axial_shape": [size.size, size.size, 3],
        },
    }


def make_model(options: dict[str, Any], size: Size) -> PerformerForCausalLM:
    """A model whose weights begin with what is known of pixels; they are trained like all others.

    Embeddings of values, and of the rows and columns of axial positions, are waves of the number,
    so that neighbours are alike. With rotary positions the biases of queries and keys look at the
    input that is the same channel of the pixel to the left (even heads) or above (odd heads).
    """
    config = PerformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.inner,
        hidden_dropout_prob=0.0,
        max_position_embeddings=size.length,
        num_features=size.features,
        initializer_range=size.initial,
        is_decoder=True,
        pad_token_id=None,
        bos_token_id=BEGIN,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(size.seed)
    model = PerformerForCausalLM(config)
    performer: Any = model.performer
    with torch.no_grad():
        performer.embeddings.weight[:256] = 0.1 * _waves(256, size.width)
        if config.position_embedding == "axial":
            for table in performer.positions.tables[:2]:
                table.weight.copy_(0.02 * _waves(size.size, size.width))
        else:
            look_back_(model, (2, size.line - 1))
    return model


def _waves(count: int, width: int) -> Tensor:
    """Sines and cosines of 0, 1, ...: wavelengths from 4 to four times ``count``."""
    lengths = 4 * count ** torch.linspace(0, 1, width // 2)
    angles = 2 * math.pi * torch.arange(count)[:, None] / lengths
    return torch.cat((angles.sin(), angles.cos()), dim=1)
