"""Small models of every kind, and the inputs they are put through."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
    registry,
)

VOCABULARY = 31
PAD = 0
KINDS = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])

# One of each kind: exponential features, elementwise ones, keys and values, nothing.
MAIN = ("favor-softmax", "favor-relu", "exact", "identity")
# Studies register others, and test them.
ATTENTIONS = tuple(name for name in registry.ATTENTIONS if name in MAIN or name[:6] == "favor-")
# Kernels of both signs, whose normalisers come near zero.
SIGNED = ("favor-tanh", "favor-gelu", "favor-identity")

# Options of the models that names stand for.
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"attention": name} for name in ATTENTIONS},
    "window": {"window": 3},
    "window and sinks": {"window": 2, "sinks": 1},
    "hybrid": {"exact_layers": [1], "window": 2, "sinks": 1},
    "hybrid, outer": {"exact_layers": [0, 2], "num_hidden_layers": 3},
    "hybrid, inner": {"exact_layers": [1], "num_hidden_layers": 3},
    "reversible": {"reversible": True},
    "trigonometric": {"estimator": "trigonometric"},
    "memory": {"attention": "exact", "attention_options": {"memory": 4}},
}
EXACT_TERMS = ("window and sinks", "hybrid, outer", "hybrid, inner")

# Names that a law is tried on by default.
_TRIED = (*MAIN, SIGNED[0], "window", "reversible", *EXACT_TERMS)


def _tried(*names: str) -> list[Any]:
    """Values to parametrize with, behind ``-m exhaustive`` for kernels that others stand for."""
    rest = pytest.mark.exhaustive
    return [name if name in _TRIED else pytest.param(name, marks=rest) for name in names]


PLAIN = _tried(*ATTENTIONS, "window")
NAMES = [*PLAIN, pytest.param("reversible", marks=pytest.mark.exhaustive)]
CACHED = _tried(*ATTENTIONS, *EXACT_TERMS, "window", "reversible")

# Two ways to the same numbers in float64. Maps of both signs have normalisers near zero, which
# make more of rounding.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}


HEADS = (
    PerformerModel,
    PerformerForMaskedLM,
    PerformerForCausalLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerForQuestionAnswering,
)


def auto_class(head: type) -> Any:
    """The class of transformers that opens a head."""
    name = head.__name__.replace("PerformerFor", "PerformerModelFor")
    return getattr(transformers, name.replace("Performer", "Auto"))


def output_names(head: type) -> tuple[str, ...]:
    """Outputs of a head beside those that all have."""
    others = {
        PerformerModel: ("last_hidden_state",),
        PerformerForQuestionAnswering: ("start_logits", "end_logits"),
    }
    return others.get(head, ("logits",))


def targets(head: type, ids: Tensor) -> dict[str, Tensor]:
    """Labels of rows, as a head takes them."""
    if head is PerformerModel:
        return {}
    if head is PerformerForQuestionAnswering:
        return {"start_positions": ids[:, 0] % 5, "end_positions": ids[:, 1] % 5}
    if head is PerformerForSequenceClassification:
        return {"labels": ids.sum(-1) % 2}
    return {"labels": ids % 2 if head is PerformerForTokenClassification else ids}


def make_config(name: str = "favor-softmax", **options: Any) -> PerformerConfig:
    """A configuration of a model that runs in milliseconds."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.0,
        "max_position_embeddings": 128,
        # Large enough for attention to depart from uniform.
        "initializer_range": 0.2,
    }
    settings |= MODELS[name] | options
    if settings.get("position_embedding") == "axial" and "axial_shape" not in settings:
        length = settings["max_position_embeddings"]
        rows = next(n for n in range(math.isqrt(length), 0, -1) if length % n == 0)
        settings["axial_shape"] = (rows, length // rows)
    return PerformerConfig(**settings)


def build(head: type, name: str = "favor-softmax", *, seed: int = 0, **options: Any) -> Any:
    """A model in float32, in eval mode."""
    torch.manual_seed(seed)
    return head(make_config(name, **options)).eval()


def masked_model(name: str = "favor-softmax", **options: Any) -> PerformerForMaskedLM:
    """A bidirectional language model in float64, in eval mode."""
    return build(PerformerForMaskedLM, name, **options).double()


def causal_model(name: str = "favor-softmax", **options: Any) -> PerformerForCausalLM:
    """A causal language model in float64, in eval mode."""
    return build(PerformerForCausalLM, name, **options).double()


def make_model(name: str, is_causal: bool, **options: Any) -> Any:
    """A language model of either kind."""
    return (causal_model if is_causal else masked_model)(name, **options)


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random ids without special tokens, ``(batch, length)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)


def rows_of(*lengths: int) -> list[Tensor]:
    """A sequence of each length."""
    return [tokens(1, length, seed=length)[0] for length in lengths]


def padded(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch, and its mask."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask


left_padded, right_padded = partial(padded, left=True), partial(padded, left=False)


def read(model: Any, ids: Tensor, mask: Tensor | None, cuts: tuple[int, ...], **options: Any):
    """The logits of rows read in pieces, and the cache after them.

    ``whole_mask=True`` passes the columns of the past with each mask, ``cache`` continues.
    """
    whole, cache = options.get("whole_mask", False), options.get("cache")
    logits, start = [], 0
    for size in cuts:
        stop = start + size
        part = None if mask is None else mask[:, (0 if whole else start) : stop]
        output = model(
            ids[:, start:stop], attention_mask=part, past_key_values=cache, use_cache=True
        )
        logits.append(output.logits)
        cache, start = output.past_key_values, stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1), cache


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters, by name, which are then forgotten."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], **tolerance: Any
) -> None:
    """Compare tensors by name, to the bit without a tolerance."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name],
            tensor,
            msg=lambda text, name=name: f"{name}: {text}",
            **(tolerance or {"rtol": 0, "atol": 0}),
        )
