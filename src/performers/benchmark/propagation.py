"""The error of a whole model when its attention is replaced.

An approximation that is off by a tenth in every layer may be off by far less or far more at the
end of a model: residual connections and normalisation damp errors, depth piles them up.
`propagate` compares hidden states and losses with those of the original model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from performers.benchmark.replacement import replace_attention
from performers.convert.distillation.pretrained import LoadedModel

__all__ = ["LayerError", "Propagation", "propagate"]


@dataclass(frozen=True)
class LayerError:
    """How far a layer's hidden states moved.

    Attributes:
        layer: The layer's index.
        error: ``|replaced - original| / |original|`` in the Frobenius norm, over all positions
            that are not padding. The last layer's includes the model's final normalisation.
    """

    layer: int
    error: float


@dataclass(frozen=True)
class Propagation:
    """What replacing the attention did to a model.

    Attributes:
        layers: The error after each layer.
        cosine: Mean over positions of the cosine between the final hidden states.
        loss: Cross-entropy of the original model, nats a predicted token; None without a head.
        replaced_loss: The same with the attention replaced.
        predicted: Number of tokens that the losses are means over.
    """

    layers: tuple[LayerError, ...]
    cosine: float
    loss: float | None
    replaced_loss: float | None
    predicted: int

    @property
    def final(self) -> float:
        """The error of the hidden states that the model ends with."""
        return self.layers[-1].error

    @property
    def perplexity(self) -> float | None:
        """``exp(loss)``."""
        return _exponential(self.loss)

    @property
    def replaced_perplexity(self) -> float | None:
        """``exp(replaced_loss)``."""
        return _exponential(self.replaced_loss)


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

    Returns:
        Relative errors of the hidden states after each layer, the cosine of the last, and the
        two losses.

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
            if loaded.has_head and loaded.is_causal:
                positions = torch.nonzero(valid[:-1] & valid[1:])[:, 0]
                targets = ids[0, positions + 1]
            elif loaded.has_head:
                positions = _hidden_positions(loaded, ids[0], valid, mask_fraction, generator)
                targets = ids[0, positions]
                ids[0, positions] = loaded.tokenizer.mask_token_id
                outputs = run(ids, mask)
            else:
                continue
            predicted += len(positions)
            for index, output in enumerate(outputs):
                logits = output.logits[0, positions].float().cpu()
                losses[index] += float(F.cross_entropy(logits, targets, reduction="sum"))
    if not calls[0]:
        raise ValueError(f"{type(loaded.model).__name__} called none of its attention: no layers?")
    if loaded.has_head and not predicted:
        raise ValueError("input_ids has nothing to predict: sequences of two tokens or more do")
    errors = (difference / norm).sqrt().tolist()
    layers = tuple(LayerError(layer, error) for layer, error in enumerate(errors))
    cosine = float(torch.cat(cosines).mean())
    if not loaded.has_head:
        return Propagation(layers, cosine, None, None, 0)
    return Propagation(layers, cosine, losses[0] / predicted, losses[1] / predicted, predicted)


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


def _exponential(loss: float | None) -> float | None:
    if loss is None:
        return None
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
