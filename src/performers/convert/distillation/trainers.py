"""Losses of distillation, as trainers of transformers."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from performers.convert.interface.call import AttentionCall, exact_attention, linear_attention
from performers.convert.interface.implementation import intercept_attention
from performers.nn import FavorAttention
from performers.training.checkpoints import CheckpointTrainer

LOSSES = ("logits", "hidden", "embedding", "task")


class _LossTrainer(CheckpointTrainer):
    """A trainer whose model gets neither labels nor a cache, and that counts tokens.

    Attributes:
        tokens: Number of tokens seen (rows, where inputs have no mask).
    """

    tokens = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss of a batch."""
        mask = inputs.get("attention_mask")
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        self.tokens += len(next(iter(arguments.values()))) if mask is None else int(mask.sum())
        if getattr(self.accelerator.unwrap_model(model).config, "use_cache", None):
            arguments["use_cache"] = False
        loss, outputs = self.loss_and_outputs(model, arguments, inputs)
        return (loss, outputs) if return_outputs else loss

    def loss_and_outputs(
        self, model: nn.Module, arguments: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute the loss of a batch and the outputs of the model for its arguments."""
        raise NotImplementedError


class TransferTrainer(_LossTrainer):
    """Attention transfer: the linear attention of each layer learns from its exact attention.

    The model runs with exact attention; every converted layer also computes its linear attention
    of the same queries, keys and values, and the loss is the mean over layers of
    ``|linear - exact|^2 / |exact|^2``. Errors of one layer do not reach the next. Source: Zhang et
    al. 2024 (arXiv 2410.10254), Hedgehog (arXiv 2402.04347).
    """

    def __init__(self, blocks: dict[nn.Module, FavorAttention], **arguments: Any) -> None:
        self.blocks = blocks
        super().__init__(**arguments)

    def loss_and_outputs(
        self, model: nn.Module, arguments: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute the mean error of the layers."""
        errors: list[Tensor] = []

        def attend(block: FavorAttention, call: AttentionCall) -> Tensor:
            with torch.no_grad():
                exact = exact_attention(call)
            linear = linear_attention(block, call)
            errors.append(relative_error(linear, exact, batch.get("attention_mask")))
            return exact

        functions = {x: functools.partial(attend, block) for x, block in self.blocks.items()}
        with intercept_attention(functions, self.accelerator.unwrap_model(model)):
            outputs = model(**arguments)
        return torch.stack(errors).mean(), outputs


class DistillationTrainer(_LossTrainer):
    """Training of the whole model on the original's outputs, or on its task.

    * ``"logits"``: Kullback-Leibler divergence of the predicted distributions,
      ``KL(teacher || student)``, nats per token, plus ``hidden_weight`` times the next one.
    * ``"hidden"``: ``|student - teacher|^2 / |teacher|^2`` of hidden states, mean over layers.
    * ``"embedding"``: the same of the last hidden states' mean over tokens, the usual embedding of
      a sentence, plus ``hidden_weight`` times that of all hidden states.
    * ``"task"``: the loss that the model computes from ``labels``, without a teacher.
    """

    def __init__(
        self, teacher: Any, *, loss: str, hidden_weight: float = 1.0, **arguments: Any
    ) -> None:
        self.loss, self.hidden_weight = loss, hidden_weight
        super().__init__(**arguments)
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()

    def loss_and_outputs(
        self, model: nn.Module, arguments: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute the loss by its name."""
        if self.loss == "task":
            outputs = model(**arguments, labels=batch["labels"])
            return outputs.loss, outputs
        assert self.teacher is not None
        hidden = self.loss != "logits" or bool(self.hidden_weight)
        with torch.no_grad():
            target = self.teacher(**arguments, output_hidden_states=hidden)
        outputs = model(**arguments, output_hidden_states=hidden)
        mask = batch.get("attention_mask")
        loss = torch.zeros((), device=self.args.device)
        if hidden:
            pairs = zip(outputs.hidden_states[1:], target.hidden_states[1:], strict=True)
            loss = torch.stack([relative_error(x, y, mask) for x, y in pairs]).mean()
        if self.loss == "logits":
            loss = self.hidden_weight * loss + _divergence(outputs.logits, target.logits, mask)
        elif self.loss == "embedding":
            pooled = [_pooled(x.hidden_states[-1], mask) for x in (outputs, target)]
            loss = self.hidden_weight * loss + relative_error(*pooled)
        return loss, outputs


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute ``|output - target|^2 / |target|^2`` of ``(B, ..., L, D)`` over the tokens of a mask.

    A mask ``(B, L)`` of another length than the outputs is ignored.
    """
    difference = (output.float() - target.float()).square().sum(-1)
    norm = target.float().square().sum(-1)
    if mask is not None and mask.shape[1] == norm.shape[-1]:
        weight = mask.to(norm.dtype).view(mask.shape[0], *(1,) * (norm.ndim - 2), mask.shape[1])
        difference, norm = difference * weight, norm * weight
    return difference.sum() / norm.sum().clamp_min(torch.finfo(norm.dtype).tiny)


def _pooled(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens that are not padding, (B, 1, D)."""
    if mask is None or mask.shape[1] != states.shape[1]:
        return states.float().mean(1, keepdim=True)
    weight = mask.to(torch.float32).unsqueeze(-1)
    return (states.float() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def _divergence(logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """``KL(teacher || student)``, mean over tokens."""
    own, theirs = (F.log_softmax(x.float(), dim=-1) for x in (logits, targets))
    each = F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    weight = mask.to(each.dtype)
    return (each * weight).sum() / weight.sum().clamp_min(1)
