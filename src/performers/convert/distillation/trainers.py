"""The two losses of distillation, as trainers of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from performers.convert.interface.call import AttentionCall, exact_attention, linear_attention
from performers.convert.interface.implementation import intercept_attention
from performers.nn import FavorAttention
from performers.training.checkpoints import CheckpointTrainer

__all__ = ["LOSSES", "DistillationTrainer", "TransferTrainer", "relative_error"]

LOSSES = ("logits", "hidden", "embedding", "task")


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """``|output - target|^2 / |target|^2`` of ``(B, ..., L, D)``, where ``mask`` (B, L) counts."""
    difference = (output.float() - target.float()).square().sum(-1)
    norm = target.float().square().sum(-1)
    if mask is not None:
        weight = mask.to(norm.dtype).view(mask.shape[0], *(1,) * (norm.ndim - 2), mask.shape[1])
        difference, norm = difference * weight, norm * weight
    return difference.sum() / norm.sum().clamp_min(torch.finfo(norm.dtype).tiny)


class _InputsTrainer(CheckpointTrainer):
    """A trainer whose model gets no labels, and no cache, and that counts tokens.

    Attributes:
        tokens: Tokens (rows, where inputs have no mask) seen so far.
    """

    tokens = 0

    def _inputs(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        mask = inputs.get("attention_mask")
        self.tokens += len(next(iter(inputs.values()))) if mask is None else int(mask.sum())
        if getattr(self.accelerator.unwrap_model(model).config, "use_cache", None):
            inputs["use_cache"] = False
        return inputs


class TransferTrainer(_InputsTrainer):
    """Attention transfer: each layer's linear attention learns its exact one.

    The model runs with exact attention; every converted layer also computes its linear attention
    of the same queries, keys and values, and the loss is the mean over layers of
    ``|linear - exact|^2 / |exact|^2``. Layers do not see each other's errors. Source: Zhang et al.
    2024 (arXiv 2410.10254), Hedgehog (arXiv 2402.04347).
    """

    def __init__(self, blocks: dict[nn.Module, FavorAttention], **arguments: Any) -> None:
        self.blocks = blocks
        super().__init__(**arguments)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean error of a batch."""
        errors: list[Tensor] = []
        mask = inputs.get("attention_mask")

        def observer(block: FavorAttention) -> Callable[[AttentionCall], Tensor]:
            def observe(call: AttentionCall) -> Tensor:
                with torch.no_grad():
                    exact = exact_attention(call)
                rows = mask if mask is not None and mask.shape[1] == exact.shape[2] else None
                errors.append(relative_error(linear_attention(block, call), exact, rows))
                return exact

            return observe

        functions = {module: observer(block) for module, block in self.blocks.items()}
        with intercept_attention(functions, self.accelerator.unwrap_model(model)):
            outputs = model(**self._inputs(model, inputs))
        loss = torch.stack(errors).mean()
        return (loss, outputs) if return_outputs else loss


class DistillationTrainer(_InputsTrainer):
    """The whole model learns from the original one, or from its task.

    * ``"logits"``: Kullback-Leibler divergence of the next-token (or hidden-token) distributions,
      ``KL(teacher || student)``, nats a token, plus ``hidden_weight`` times the next one.
    * ``"hidden"``: ``|student - teacher|^2 / |teacher|^2`` of hidden states, mean over layers.
    * ``"embedding"``: the same of the last hidden states' mean over tokens, the usual embedding of
      a sentence, plus ``hidden_weight`` times that of all hidden states.
    * ``"task"``: the loss that the model computes from ``labels``.

    Args:
        teacher: The original model, or None for the task's loss.
        loss: One of the four.
        hidden_weight: See above.
        **arguments: Of ``transformers.Trainer``.
    """

    def __init__(
        self, teacher: Any, *, loss: str, hidden_weight: float = 1.0, **arguments: Any
    ) -> None:
        self.teacher = teacher
        self.loss, self.hidden_weight = loss, hidden_weight
        super().__init__(**arguments)
        if teacher is not None:
            self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch."""
        if self.loss == "task":
            inputs = {**self._inputs(model, inputs), "labels": inputs["labels"]}
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        inputs = self._inputs(model, inputs)
        hidden = self.loss != "logits" or bool(self.hidden_weight)
        with torch.no_grad():
            target = self.teacher(**inputs, output_hidden_states=hidden)
        outputs = model(**inputs, output_hidden_states=hidden)
        mask = inputs.get("attention_mask")
        loss = torch.zeros((), device=self.args.device)
        if hidden:
            loss = _hidden_error(outputs.hidden_states, target.hidden_states, mask)
        if self.loss == "logits":
            loss = self.hidden_weight * loss + _divergence(outputs.logits, target.logits, mask)
        elif self.loss == "embedding":
            pooled = [_pooled(x.hidden_states[-1], mask) for x in (outputs, target)]
            loss = self.hidden_weight * loss + relative_error(*pooled)
        return (loss, outputs) if return_outputs else loss


def _hidden_error(
    states: tuple[Tensor, ...], targets: tuple[Tensor, ...], mask: Tensor | None
) -> Tensor:
    pairs = list(zip(states[1:], targets[1:], strict=True))
    errors = [
        relative_error(x, y, mask if mask is not None and mask.shape[1] == x.shape[1] else None)
        for x, y in pairs
    ]
    return torch.stack(errors).mean()


def _pooled(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens that are not padding, (B, 1, D)."""
    if mask is None or mask.shape[1] != states.shape[1]:
        return states.float().mean(1, keepdim=True)
    weight = mask.to(torch.float32).unsqueeze(-1)
    return (states.float() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def _divergence(logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """``KL(teacher || student)``, mean over tokens."""
    each = F.kl_div(
        F.log_softmax(logits.float(), dim=-1),
        F.log_softmax(targets.float(), dim=-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    weight = mask.to(each.dtype)
    return (each * weight).sum() / weight.sum().clamp_min(1)
