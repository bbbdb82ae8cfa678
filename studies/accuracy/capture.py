"""The attention layers of a pretrained model: their inputs, and another attention in their place.

Random inputs say little about how well attention is approximated: trained heads have long queries
and keys, a few keys that every query attends to, and rotary positions. An approximation that is off
by a tenth in every layer may be off by far less or far more at the end of a model: residual
connections and normalisation damp errors, depth accumulates them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.convert.distillation.pretrained import LoadedModel
from performers.convert.distillation.quality import Quality, kind_of, measure_quality
from performers.convert.families.base import call_model
from performers.convert.interface.call import AttentionCall, check_linear
from performers.convert.interface.implementation import intercept_attention, interface_modules
from performers.planning import exact
from performers.planning.samples import Samples


@dataclass(frozen=True)
class HeadSample(Samples):
    """Inputs of one attention layer, after projections and rotary positions."""

    layer: int


Attention = Callable[[Any], Tensor]
"""Attention (B, H, L, Dv) of a `HeadSample`."""


@torch.no_grad()
def exact_attention(sample: Samples) -> Tensor:
    """Softmax attention of torch."""
    return exact.exact_attention(sample.query, sample.key, sample.value, **sample.options)


def capture_heads(
    loaded: LoadedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layers: Collection[int] | None = None,
) -> list[HeadSample]:
    """Run a model once and keep the inputs of its attention layers, all or some.

    Raises:
        ValueError: The inputs do not fit the model, a layer is not there, or the model's attention
            is not softmax attention under a causal or key-padding mask.
    """
    samples: dict[int, HeadSample | None] = {}

    def keep(sample: HeadSample) -> Tensor:
        if sample.layer in samples:
            raise ValueError(
                f"layer {sample.layer} of {type(loaded.model).__name__} attends more than once in "
                "a forward pass; only self-attention can be captured"
            )
        wanted = layers is None or sample.layer in layers
        samples[sample.layer] = sample if wanted else None
        return exact_attention(sample)

    with torch.no_grad(), replace_attention(loaded.model, keep):
        call_model(loaded.model, input_ids=input_ids, attention_mask=attention_mask)
    if layers is not None and not set(layers) <= set(samples):
        raise ValueError(
            f"layers must be some of the model's attention layers {sorted(samples)}, "
            f"got {list(layers)}"
        )
    return [sample for _, sample in sorted(samples.items()) if sample is not None]


@contextlib.contextmanager
def replace_attention(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Inside this context every attention layer of a model is computed by a function.

    ``layer`` of a sample is the attention module's ``layer_idx`` or, where it has none, its place
    in the order of calls. The model runs without a key-value cache and without attention dropout.
    Its own attention is back afterwards, also after an error.

    Raises:
        ValueError: The model's attention does not go through the interface or, when it is called,
            is not self-attention by softmax under a causal or key-padding mask.
    """
    order: dict[nn.Module, int] = {}

    def replaced(call: AttentionCall) -> Tensor:
        index = getattr(call.module, "layer_idx", None)
        place = order.setdefault(call.module, len(order))
        if call.key.shape[2] != call.query.shape[2] or call.pattern.sequence_ids is not None:
            raise ValueError(
                f"{call.name} has {call.query.shape[2]} queries and {call.key.shape[2]} keys, or "
                "packed sequences; only self-attention over one sequence a row and without a "
                "key-value cache can be replaced: use use_cache=False"
            )
        check_linear(call)
        query, key, value = (x.contiguous() for x in (call.query, call.key, call.value))
        layer = place if index is None else index
        return attention(HeadSample(query, key, value, layer=layer, **call.favor_options()))

    modules = [module for _, module in interface_modules(model)]
    with intercept_attention(dict.fromkeys(modules, replaced), model):
        yield


@dataclass(frozen=True)
class Propagation:
    """Errors of a model whose attention was replaced.

    Attributes:
        errors: ``|replaced - original| / |original|`` of the hidden states after each layer, over
            all tokens; the last includes the model's final normalisation.
        cosine: Mean cosine of final hidden states.
        original: Predictions of the original model; None without a language-modelling head.
        replaced: The same with the attention replaced.
    """

    errors: tuple[float, ...]
    cosine: float
    original: Quality | None
    replaced: Quality | None


@torch.no_grad()
def propagate(
    loaded: LoadedModel, input_ids: Tensor, attention: Attention, *, seed: int = 0
) -> Propagation:
    """Compare a model with itself under another attention, a sequence at a time.

    Raises:
        ValueError: The inputs do not fit the model, there is nothing to predict, the tokenizer has
            no mask token, or no attention of the model could be replaced.
    """
    difference = norm = torch.zeros((), dtype=torch.float64)
    cosines: list[Tensor] = []
    calls = 0

    def counted(sample: HeadSample) -> Tensor:
        nonlocal calls
        calls += 1
        return attention(sample)

    def states(row: Tensor) -> Tensor:
        output = call_model(loaded.model, input_ids=row[None], output_hidden_states=True)
        return torch.stack(output.hidden_states[1:])[:, 0].double().cpu()

    def quality() -> Quality | None:
        if (kind := kind_of(loaded.model)) == "encoder":
            return None
        batches = [{"input_ids": row[None]} for row in input_ids]
        return measure_quality(loaded.model, None, batches, kind, loaded.tokenizer, seed=seed)

    for row in input_ids:
        expected = states(row)
        with replace_attention(loaded.model, counted):
            actual = states(row)
        difference = difference + (actual - expected).square().sum(dim=(1, 2))
        norm = norm + expected.square().sum(dim=(1, 2))
        cosines.append(F.cosine_similarity(expected[-1], actual[-1], dim=-1))
    if not calls:
        raise ValueError(f"{type(loaded.model).__name__} called none of its attention: no layers?")
    original = quality()
    with replace_attention(loaded.model, counted):
        replaced = quality()
    errors = tuple((difference / norm).sqrt().tolist())
    return Propagation(errors, float(torch.cat(cosines).mean()), original, replaced)
