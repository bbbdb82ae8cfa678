"""Losses of distillation, of rows that processes may share, as trainers of transformers."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from performers.convert.families.base import without_cache
from performers.convert.interface.call import AttentionCall, exact_attention, linear_attention
from performers.convert.interface.implementation import intercept_attention
from performers.convert.options import converted_modules
from performers.convert.record import read_record
from performers.distributed import sequence_parallel, shard
from performers.distributed.batches import with_least_length
from performers.distributed.messages import summed
from performers.nn import FavorAttention
from performers.training.parallel import ParallelTrainer

LOSSES = ("logits", "hidden", "embedding", "task")
_NO_ARGUMENTS = ("labels", "shift_labels", "targets")


@dataclass(frozen=True)
class Row:
    """The processes that share each row of a batch, in consecutive shards.

    Attributes:
        group: The processes; None: this one has whole rows.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def shard(
        self, batch: Mapping[str, Tensor], *, is_causal: bool, counts_padding: bool = False
    ) -> dict[str, Tensor]:
        """This process's shard of a batch, with the positions that the model counts in whole rows.

        Labels are the next token's if ``is_causal``; with ``counts_padding``, padding before the
        tokens of a row has positions too.
        """
        whole, mask = dict(batch), batch.get("attention_mask")
        if counts_padding and mask is not None and "position_ids" not in whole:
            places = torch.arange(mask.shape[1], device=mask.device)
            # Not beyond the last token: rows are padded at the end, where tables of positions stop.
            last = (places * (mask != 0)).amax(1, keepdim=True)
            whole["position_ids"] = places.minimum(last)
        return shard(whole, self.group, is_causal=is_causal)

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """This process's shard of a tensor of whole rows, whose positions are along an axis."""
        if self.group is None:
            return x
        return x.tensor_split(self.size, dim=axis)[dist.get_rank(self.group)].contiguous()

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes, without gradient."""
        x = x.detach().clone()
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def joined(self, x: Tensor) -> Tensor:
        """The sum over the processes, with the gradients of all."""
        return x if self.group is None else summed(x, self.group)


def relative_error(
    output: Tensor, target: Tensor, mask: Tensor | None = None, row: Row | None = None
) -> Tensor:
    """``|output - target|^2 / |target|^2`` of ``(B, ..., L, D)`` over the tokens of a mask.

    A mask ``(B, L)`` of another length than the outputs is ignored. Of a row that processes share
    it is the part of this one; the parts add up.
    """
    difference = (output.float() - target.float()).square().sum(-1)
    norm = target.float().square().sum(-1)
    if mask is not None and mask.shape[1] == norm.shape[-1]:
        weight = mask.to(norm.dtype).view(mask.shape[0], *(1,) * (norm.ndim - 2), mask.shape[1])
        difference, norm = difference * weight, norm * weight
    whole = (row or Row()).total(norm.sum())
    return difference.sum() / whole.clamp_min(torch.finfo(norm.dtype).tiny)


def mean_state(states: Tensor, mask: Tensor | None, row: Row) -> Tensor:
    """Mean over the tokens of a row that are not padding, ``(B, 1, D)``."""
    if mask is None or mask.shape[1] != states.shape[1]:
        mask = states.new_ones(states.shape[:2])
    weight = mask.to(torch.float32).unsqueeze(-1)
    total = row.joined((states.float() * weight).sum(1, keepdim=True))
    return total / row.total(weight.sum(1, keepdim=True))


def divergence(logits: Tensor, targets: Tensor, mask: Tensor | None, row: Row) -> Tensor:
    """``KL(teacher || student)``, mean over tokens; of a shared row, the part of this process."""
    own, theirs = (F.log_softmax(x.float(), dim=-1) for x in (logits, targets))
    each = F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1)
    weight = torch.ones_like(each)
    if mask is not None and mask.shape == each.shape:
        weight = mask.to(each.dtype)
    return (each * weight).sum() / row.total(weight.sum()).clamp_min(1)


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
        """The batch of the first process of a row, long enough to be cut.

        The other processes take it over: draws of a collator differ.

        Raises:
            ValueError: The batch has no ``input_ids``, or something else than tensors.
        """
        others = sorted(name for name, x in inputs.items() if not isinstance(x, Tensor))
        if others or "input_ids" not in inputs:
            raise ValueError(
                f"data must give batches of tensors with input_ids, got {sorted(inputs)}: rows of "
                "other inputs cannot be cut; pass sequence_parallel=1"
            )
        first: list[Any] = [{name: x.cpu() for name, x in inputs.items()}]
        dist.broadcast_object_list(first, group_src=0, group=self.row.group)
        config: Any = self.accelerator.unwrap_model(self.model).config
        window = getattr(read_record(self.model) or config, "window", None) or 1
        pad = getattr(config, "pad_token_id", None) or 0
        batch = with_least_length(first[0], self.row.size * window, pad=pad)
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
            outputs, labels = model(**arguments), batch["labels"]
            logits = outputs.logits.float().flatten(0, 1)
            losses = F.cross_entropy(logits, labels.flatten(), reduction="sum")
            return losses / row.total((labels != -100).sum()).clamp_min(1), outputs
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
