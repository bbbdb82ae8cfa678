"""Losses of distillation, as trainers of transformers."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from performers.convert.distillation.rows import Row, divergence, mean_state, relative_error
from performers.convert.families.base import without_cache
from performers.convert.interface.call import AttentionCall, exact_attention, linear_attention
from performers.convert.interface.implementation import intercept_attention
from performers.convert.options import converted_modules
from performers.convert.record import read_record
from performers.distributed import sequence_parallel
from performers.nn import FavorAttention
from performers.training.parallel import ParallelTrainer

LOSSES = ("logits", "hidden", "embedding", "task")
_NO_ARGUMENTS = ("labels", "shift_labels", "targets")


class _LossTrainer(ParallelTrainer):
    """A trainer whose model gets neither labels nor a cache, and that counts tokens.

    ``state.num_input_tokens_seen``, which checkpoints hold, is the number of tokens (rows, where
    inputs have no mask).
    """

    # Losses are means of a batch.
    loss_is_scaled_for_ga = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.row = Row(self.sequence_group)

    def whole_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch of the first process of a row, long enough to be cut."""
        config: Any = self.accelerator.unwrap_model(self.model).config
        settings = read_record(self.model) or config
        batch = self.row.whole_batch(
            inputs,
            window=getattr(settings, "window", None) or 0,
            pad=getattr(config, "pad_token_id", None) or 0,
        )
        prepared: dict[str, Any] = self._prepare_inputs(batch)
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss of a batch."""
        mask = inputs.get("attention_mask")
        arguments = {name: x for name, x in inputs.items() if name not in _NO_ARGUMENTS}
        tokens = len(next(iter(arguments.values()))) if mask is None else int(mask.sum())
        self.state.num_input_tokens_seen += tokens
        arguments |= without_cache(self.accelerator.unwrap_model(model))
        loss, outputs = self.loss_and_outputs(model, arguments, inputs)
        # Gradients are means over processes, and losses of the processes of a row add up.
        loss = loss * self.row.size
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

    Where processes share a row, each runs the model on the whole row, which exact attention needs,
    and computes the linear attention and the errors of its shard.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.blocks = converted_modules(self.model)
        self._errors: list[Tensor] = []
        if self.args.fsdp:
            # FSDP2 finds the backward pass by the gradients of a model's outputs, and the model's
            # own have none. Its hook comes after this one.
            self.model.register_forward_hook(lambda *call: (call[-1], self._error()))

    def _error(self) -> Tensor:
        """Mean error of the layers in the last forward pass."""
        errors, self._errors = self._errors, []
        return torch.stack(errors).mean()

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return nullcontext, inputs if self.row.group is None else self.whole_batch(inputs)

    def loss_and_outputs(
        self, model: nn.Module, arguments: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute the mean error of the layers."""
        row, mask = self.row, batch.get("attention_mask")
        mask = None if mask is None else row.cut(mask, 1)

        def attend(block: FavorAttention, call: AttentionCall) -> Tensor:
            with torch.no_grad():
                exact = exact_attention(call)
            linear = self._linear(block, call)
            self._errors.append(relative_error(linear, row.cut(exact, 2), mask, row))
            return exact

        functions = {x: partial(attend, block) for x, block in self.blocks.items()}
        with intercept_attention(functions, self.accelerator.unwrap_model(model)):
            outputs = model(**arguments)
        if self.args.fsdp:
            outputs, error = outputs
            return error, outputs
        return self._error(), outputs

    def _linear(self, block: FavorAttention, call: AttentionCall) -> Tensor:
        """The linear attention of this process's shard of a call."""
        row, pattern = self.row, call.pattern
        if row.group is None:
            return linear_attention(block, call)
        key_mask = None if pattern.key_mask is None else row.cut(pattern.key_mask, 1)
        query, key, value = (row.cut(x, 2) for x in (call.query, call.key, call.value))
        cut = replace(pattern, key_mask=key_mask, sequence_ids=None)
        shard = replace(call, query=query, key=key, value=value, pattern=cut)
        with sequence_parallel(row.group, cu_seqlens=pattern.cu_seqlens):
            return linear_attention(block, shard)


class DistillationTrainer(_LossTrainer):
    """Training of the whole model on the original's outputs, or on its task.

    * ``"logits"``: Kullback-Leibler divergence of the predicted distributions,
      ``KL(teacher || student)``, nats per token, plus ``hidden_weight`` times the next one.
    * ``"hidden"``: ``|student - teacher|^2 / |teacher|^2`` of hidden states, mean over layers.
    * ``"embedding"``: the same of the last hidden states' mean over tokens, the usual embedding of
      a sentence, plus ``hidden_weight`` times that of all hidden states.
    * ``"task"``: the loss that the model computes from ``labels``, without a teacher; where
      processes share a row, the cross-entropy of its logits.

    Where processes share a row, each runs the teacher on the whole row, whose attention is exact,
    and the student on its shard.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        loss: str,
        hidden_weight: float = 1.0,
        is_causal: bool = False,
        **arguments: Any,
    ) -> None:
        self.loss, self.hidden_weight, self.is_causal = loss, hidden_weight, is_causal
        super().__init__(**arguments)
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self.row.group is None:
            return nullcontext, inputs
        batch = self.whole_batch(inputs)
        arguments = {name: x for name, x in batch.items() if name not in _NO_ARGUMENTS}
        kept = batch if self.loss == "task" else arguments
        # Models of transformers count all tokens, ours those of the mask.
        kind = getattr(self.accelerator.unwrap_model(model).config, "model_type", None)
        shards: dict[str, Any] = self.row.shard(
            kept, is_causal=self.is_causal, counts_padding=kind != "performer"
        )
        if self.loss != "task":
            # Outside the context, which would take whole rows for shards.
            shards["targets"] = self._targets(arguments | without_cache(self.teacher))
        return partial(sequence_parallel, self.row.group), shards

    @torch.no_grad()
    def _targets(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The teacher's outputs for whole rows that the student learns, for its shard."""
        assert self.teacher is not None
        hidden = self.loss != "logits" or bool(self.hidden_weight)
        outputs = self.teacher(**arguments, output_hidden_states=hidden)
        targets: dict[str, Any] = {}
        if hidden:
            targets["hidden_states"] = [self.row.cut(x, 1) for x in outputs.hidden_states[1:]]
        if self.loss == "logits":
            targets["logits"] = self.row.cut(outputs.logits, 1)
        elif self.loss == "embedding":
            mask = arguments.get("attention_mask")
            targets["embedding"] = mean_state(outputs.hidden_states[-1], mask, Row())
        return targets

    def loss_and_outputs(
        self, model: nn.Module, arguments: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute the loss by its name."""
        row = self.row
        if self.loss == "task" and row.group is None:
            outputs = model(**arguments, labels=batch["labels"])
            return outputs.loss, outputs
        if self.loss == "task":
            outputs = model(**arguments)
            return row.cross_entropy(outputs.logits, batch["labels"]), outputs
        targets = batch.get("targets") or self._targets(arguments)
        hidden = "hidden_states" in targets
        outputs = model(**arguments, output_hidden_states=hidden)
        mask = batch.get("attention_mask")
        loss = torch.zeros((), device=self.args.device)
        if hidden:
            pairs = zip(outputs.hidden_states[1:], targets["hidden_states"], strict=True)
            loss = torch.stack([relative_error(x, y, mask, row) for x, y in pairs]).mean()
        if self.loss == "logits":
            error = divergence(outputs.logits, targets["logits"], mask, row)
        elif self.loss == "embedding":
            pooled = mean_state(outputs.hidden_states[-1], mask, row)
            # All processes of a row have the whole of this term.
            error = relative_error(pooled, targets["embedding"]) / row.size
        else:
            return loss, outputs
        return self.hidden_weight * loss + error, outputs
