"""The attention layers of a pretrained model: their inputs, and another attention in their place.

Random inputs say little about how well attention is approximated: trained heads have long queries
and keys, a few keys that every query attends to, and rotary positions. An approximation that is off
by a tenth in every layer may be off by far less or far more at the end of a model: residual
connections and normalisation damp errors, depth accumulates them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.convert.distillation.pretrained import LoadedModel
from performers.convert.interface.call import AttentionCall, check_linear
from performers.convert.interface.implementation import intercept_attention, interface_modules
from performers.planning.samples import Samples

__all__ = ["HeadSample", "capture_heads", "exact_attention", "propagate", "replace_attention"]


@dataclass(frozen=True)
class HeadSample(Samples):
    """Inputs of one attention layer, after projections and rotary positions.

    Attributes:
        layer: The layer's index.
    """

    layer: int


def capture_heads(
    loaded: LoadedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layers: Iterable[int] | None = None,
) -> list[HeadSample]:
    """Run a model once and keep the inputs of its attention layers.

    Raises:
        ValueError: The inputs do not fit the model, a layer is not there, or the model's attention
            is not softmax attention under a causal or key-padding mask.
    """
    wanted = None if layers is None else set(layers)
    samples: dict[int, HeadSample | None] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        if layer in samples:
            raise ValueError(
                f"layer {layer} of {type(loaded.model).__name__} attends more than once in a "
                "forward pass; only self-attention can be captured"
            )
        samples[layer] = None
        if wanted is None or layer in wanted:
            query, key, value = (x.detach().contiguous() for x in (query, key, value))
            samples[layer] = HeadSample(query, key, value, layer=layer, **rest)
        return exact_attention(layer, query, key, value, **rest)

    with torch.no_grad(), replace_attention(loaded.model, keep):
        loaded.model(**loaded.inputs(input_ids, attention_mask))
    if wanted is not None and not (wanted and wanted <= set(samples)):
        raise ValueError(
            f"layers must be some of the model's attention layers {sorted(samples)}, "
            f"got {sorted(wanted)}"
        )
    return [sample for _, sample in sorted(samples.items()) if sample is not None]


def exact_attention(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
) -> Tensor:
    """Softmax attention of torch, with the call that `replace_attention` makes.

    Queries that see no key get zeros.
    """
    mask = None
    if key_mask is not None:
        mask = key_mask[:, None, None, :].expand(-1, 1, query.shape[2], -1)
        mask, is_causal = (mask.tril() if is_causal else mask), False
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return output if mask is None else output.masked_fill(~mask.any(dim=-1, keepdim=True), 0)


@contextlib.contextmanager
def replace_attention(
    model: PreTrainedModel, attention: Callable[..., Tensor]
) -> Iterator[PreTrainedModel]:
    """Inside this context every attention layer of a model is computed by a function.

    The function is called as ``attention(layer, query, key, value, *, scale, is_causal, key_mask)``
    with query (B, H, L, D), key (B, Hkv, L, D), value (B, Hkv, L, Dv), key_mask (B, L) bool or
    None, and returns (B, H, L, Dv); `exact_attention` is one. ``layer`` is the attention module's
    ``layer_idx`` or, where it has none, its place in the order of calls. The model runs without a
    key-value cache and without attention dropout. Its own attention is back afterwards, also after
    an error.

    Raises:
        TypeError: The model is not a transformers model.
        ValueError: Its attention does not go through the interface or, when it is called, is not
            self-attention by softmax under a causal or key-padding mask.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
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
        output = attention(
            place if index is None else index,
            call.query,
            call.key,
            call.value,
            scale=call.scale,
            is_causal=call.pattern.is_causal,
            key_mask=call.pattern.key_mask,
        )
        expected = (*call.query.shape[:3], call.value.shape[-1])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"attention must return (B, H, L, Dv) = {expected} for {call.name}, "
                f"got {tuple(output.shape)}"
            )
        return output

    modules = [module for _, module in interface_modules(model)]
    with intercept_attention(dict.fromkeys(modules, replaced), model):
        yield model


@dataclass(frozen=True)
class Propagation:
    """Errors of a model whose attention was replaced.

    Attributes:
        errors: ``|replaced - original| / |original|`` of the hidden states after each layer, over
            all tokens that are not padding; the last includes the model's final normalisation.
        cosine: Mean cosine of final hidden states.
        loss: Loss of the original model, nats a predicted token; None without a head.
        replaced_loss: The same with the attention replaced.
        predicted: Number of tokens that the losses are means over.
    """

    errors: tuple[float, ...]
    cosine: float
    loss: float | None = None
    replaced_loss: float | None = None
    predicted: int = 0


def propagate(
    loaded: LoadedModel,
    input_ids: Tensor,
    attention: Callable[..., Tensor],
    *,
    attention_mask: Tensor | None = None,
    mask_fraction: float = 0.15,
    seed: int = 0,
) -> Propagation:
    """Compare a model with itself under another attention.

    Sequences run one at a time. With a language-modelling head the loss is that of the next token
    (causal), or that of tokens hidden behind the mask token, which are the same ones for both
    models (masked); hidden states are always compared on the input as it is.

    Args:
        loaded: The model.
        input_ids: Token ids (B, L).
        attention: The function that replaces its attention; see `replace_attention`.
        attention_mask: (B, L), nonzero where a token takes part; None: all do.
        mask_fraction: Share of the tokens that are hidden from a masked language model.
        seed: Seed of the choice of these.

    Raises:
        ValueError: The inputs do not fit the model, there is nothing to predict, the tokenizer has
            no mask token, or no attention of the model could be replaced.
    """
    if not 0 < mask_fraction <= 1:
        raise ValueError(f"mask_fraction must be in (0, 1], got {mask_fraction}")
    loaded.inputs(input_ids, attention_mask)
    generator = torch.Generator().manual_seed(seed)
    difference = norm = torch.zeros((), dtype=torch.float64)
    cosines: list[Tensor] = []
    losses, predicted, calls = [0.0, 0.0], 0, [0]

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        calls[0] += 1
        return attention(*arguments, **keywords)

    def run(ids: Tensor, mask: Tensor) -> tuple[Any, Any]:
        arguments = loaded.inputs(ids, mask)
        original = loaded.model(**arguments, output_hidden_states=True)
        with replace_attention(loaded.model, counted):
            return original, loaded.model(**arguments, output_hidden_states=True)

    for row in range(len(input_ids)):
        ids = input_ids[row : row + 1].to("cpu", torch.long, copy=True)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask[row : row + 1]
        valid = mask[0].cpu() != 0
        with torch.no_grad():
            outputs = run(ids, mask)
            states = [torch.stack(x.hidden_states[1:])[:, 0, valid].double() for x in outputs]
            difference = difference + (states[1] - states[0]).square().sum(dim=(1, 2)).cpu()
            norm = norm + states[0].square().sum(dim=(1, 2)).cpu()
            cosines.append(F.cosine_similarity(states[0][-1], states[1][-1], dim=-1).cpu())
            if not loaded.has_head:
                continue
            if loaded.is_causal:
                positions = torch.nonzero(valid[:-1] & valid[1:])[:, 0]
                targets = ids[0, positions + 1]
            else:
                positions = _hidden_positions(loaded, ids[0], valid, mask_fraction, generator)
                targets = ids[0, positions]
                ids[0, positions] = loaded.tokenizer.mask_token_id
                outputs = run(ids, mask)
            predicted += len(positions)
            for index, output in enumerate(outputs):
                logits = output.logits[0, positions].float().cpu()
                losses[index] += float(F.cross_entropy(logits, targets, reduction="sum"))
    if not calls[0]:
        raise ValueError(f"{type(loaded.model).__name__} called none of its attention: no layers?")
    errors = tuple((difference / norm).sqrt().tolist())
    cosine = float(torch.cat(cosines).mean())
    if not loaded.has_head:
        return Propagation(errors, cosine)
    if not predicted:
        raise ValueError("input_ids has nothing to predict: sequences of two tokens or more do")
    return Propagation(errors, cosine, losses[0] / predicted, losses[1] / predicted, predicted)


def _hidden_positions(
    loaded: LoadedModel, ids: Tensor, valid: Tensor, fraction: float, generator: torch.Generator
) -> Tensor:
    """Positions to hide from a masked language model: ordinary tokens, drawn without repeats."""
    tokenizer = loaded.tokenizer
    if tokenizer is None or tokenizer.mask_token_id is None:
        raise ValueError(
            f"the loss of a masked language model needs a tokenizer with a mask token, and "
            f"{loaded.path} has none: load it with head=False"
        )
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    ordinary = torch.nonzero(valid & ~special)[:, 0]
    number = min(len(ordinary), max(1, round(fraction * len(ordinary))))
    chosen = torch.randperm(len(ordinary), generator=generator)[:number]
    return ordinary[chosen].sort().values


def perplexity(loss: float | None) -> float | None:
    """``exp(loss)``; infinite where it overflows, None for None."""
    if loss is None:
        return None
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
