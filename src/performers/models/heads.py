"""Heads: language modelling, classification of sequences and tokens, question answering."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from performers.attention.sharding import check_not_sharded
from performers.models.arguments import (
    CACHE_KEYWORD,
    CACHE_KEYWORDS,
    PACKING,
    either_cache,
    sequence_starts,
    take_loss_options,
    with_both_cache_names,
)
from performers.models.configuration import PerformerConfig
from performers.models.modeling import PerformerModel, PerformerPreTrainedModel
from performers.models.registry import ATTENTIONS


class _LanguageModel(PerformerPreTrainedModel):
    """A Performer whose output layer shares the input embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "performer.embeddings.weight"}

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.performer = PerformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _predict(
        self, hidden_states: Tensor, labels: Tensor | None, loss_options: dict[str, Any]
    ) -> dict[str, Tensor | None]:
        logits = self.lm_head(hidden_states)
        loss_options |= {"logits": logits, "labels": labels, "vocab_size": self.config.vocab_size}
        loss = None if labels is None else self.loss_function(**loss_options)
        return {"loss": loss, "logits": logits}


class PerformerForMaskedLM(_LanguageModel):
    """Predicts the tokens hidden behind the mask token; attention is bidirectional."""

    def __init__(self, config: PerformerConfig) -> None:
        if config.is_decoder:
            raise ValueError(
                "PerformerForMaskedLM needs bidirectional attention: set config.is_decoder=False"
            )
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits ``(B, L, vocab_size)`` and, with labels, the mean cross entropy.

        Labels have shape ``(B, L)``, -100 where no prediction is asked for. All other arguments
        are those of ``PerformerModel.forward`` and options of the loss (``num_items_in_batch``,
        ``ignore_index``, ``shift_labels``).
        """
        inputs = input_ids, attention_mask, position_ids, sequence_ids, inputs_embeds
        output, loss_options = _run(self, inputs, kwargs)
        predicted = self._predict(output.last_hidden_state, labels, loss_options)
        return MaskedLMOutput(**predicted, **_shown(output))


@with_both_cache_names
@dataclass
class PerformerCausalLMOutput(CausalLMOutputWithPast):
    """Loss, logits, the cache and what else was asked for."""


class PerformerForCausalLM(_LanguageModel, GenerationMixin):
    """Predicts the next token; linear attention generates with a state of constant size."""

    def __init__(self, config: PerformerConfig) -> None:
        if not config.is_decoder:
            # The caller may build other models from the same configuration.
            config = copy.deepcopy(config)
            config.is_decoder = True
        super().__init__(config)

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generate as ``transformers.GenerationMixin.generate`` does.

        Attentions without a cache, such as ``lsh``, read the whole row again for each token,
        whatever ``generation_config.use_cache`` is: a copy of a model's own has True in it.

        Raises:
            ValueError: ``use_cache=True`` was asked for and the attention has no cache.
        """
        cache = either_cache(*(kwargs.pop(name, None) for name in CACHE_KEYWORDS))
        if cache is not None:
            kwargs[CACHE_KEYWORD] = cache
        attention = self.config.attention
        if ATTENTIONS[attention].cache is None:
            if kwargs.pop("use_cache", None):
                raise ValueError(
                    f"attention={attention!r} has no cache: leave out use_cache=True, and the "
                    "whole row is read again for each token"
                )
            if generation_config is None:
                kwargs["use_cache"] = False
            else:
                # transformers warns of options beside a configuration.
                generation_config = copy.deepcopy(generation_config)
                generation_config.use_cache = False
        return super().generate(inputs, generation_config, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> PerformerCausalLMOutput:
        """Logits ``(B, L, vocab_size)`` and, with labels, the mean cross entropy of the next token.

        Labels have shape ``(B, L)`` and the places of ``input_ids`` (they are shifted inside), -100
        where no prediction is asked for. Logits are computed for the last ``logits_to_keep`` tokens
        (0: all), or for the indices that it holds. All other arguments are those of
        ``PerformerModel.forward`` and options of the loss, see ``PerformerForMaskedLM.forward``.
        """
        inputs = input_ids, attention_mask, position_ids, sequence_ids, inputs_embeds
        kwargs |= {"past_key_values": past_key_values, "cache": cache}
        output, loss_options = _run(self, inputs, kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return PerformerCausalLMOutput(
            **self._predict(output.last_hidden_state[:, keep], labels, loss_options),
            **_shown(output),
            **{CACHE_KEYWORD: getattr(output, CACHE_KEYWORD)},
        )


class _Classifier(PerformerPreTrainedModel):
    """A Performer with dropout and a linear layer over its hidden states."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.performer = PerformerModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class PerformerForSequenceClassification(_Classifier):
    """A label per sequence, read from the mean of its final hidden states."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits ``(B, num_labels)`` and, with labels, the loss for ``config.problem_type``.

        Labels have shape ``(B,)`` (classes or values) or ``(B, num_labels)`` (several labels). All
        other arguments are those of ``PerformerModel.forward`` and options of the loss, see
        ``PerformerForMaskedLM.forward``; padding does not enter the mean.

        Raises:
            ValueError: Rows are packed: there is one label for a row.
        """
        inputs = input_ids, attention_mask, position_ids, kwargs.pop("sequence_ids", None)
        output, loss_options = _run_rows(self, (*inputs, inputs_embeds), kwargs)
        logits = self.classifier(self.dropout(mean_pool(output.last_hidden_state, attention_mask)))
        loss_options |= {"labels": labels, "pooled_logits": logits, "config": self.config}
        loss = None if labels is None else self.loss_function(**loss_options)
        return SequenceClassifierOutput(loss=loss, logits=logits, **_shown(output))


class PerformerForTokenClassification(_Classifier):
    """A label per token, such as the secondary structure of each residue."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits ``(B, L, num_labels)`` and, with labels, the mean cross entropy.

        The arguments are those of ``PerformerForMaskedLM.forward``.
        """
        inputs = input_ids, attention_mask, position_ids, sequence_ids, inputs_embeds
        output, loss_options = _run(self, inputs, {**kwargs, "use_cache": False})
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss_options |= {"logits": logits, "labels": labels, "config": self.config}
        loss = None if labels is None else self.loss_function(**loss_options)
        return TokenClassifierOutput(loss=loss, logits=logits, **_shown(output))


class PerformerForQuestionAnswering(PerformerPreTrainedModel):
    """The first and last token of an answer within its context."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.performer = PerformerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Scores of each token as first and as last of the answer, ``(B, L)`` each.

        With ``start_positions`` and ``end_positions`` of shape ``(B,)``, the indices of the first
        and last token of the answer, the loss is the mean of both cross entropies; indices beyond
        the row have none. All other arguments are those of ``PerformerModel.forward`` and options
        of the loss, see ``PerformerForMaskedLM.forward``.

        Raises:
            ValueError: One of the two positions is missing, or rows are packed.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("pass both start_positions and end_positions, or neither")
        inputs = input_ids, attention_mask, position_ids, kwargs.pop("sequence_ids", None)
        output, loss_options = _run_rows(self, (*inputs, inputs_embeds), kwargs)
        starts, ends = self.qa_outputs(output.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            loss = self.loss_function(starts, ends, start_positions, end_positions, **loss_options)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=starts.contiguous(),
            end_logits=ends.contiguous(),
            **_shown(output),
        )


_INPUTS = ("input_ids", "attention_mask", "position_ids", "sequence_ids", "inputs_embeds")
_Inputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _run(model: Any, inputs: _Inputs, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Output of the base model of a head, and the options of the loss among those of the call."""
    loss_options = take_loss_options(options)
    named = dict(zip(_INPUTS, inputs, strict=True))
    return model.performer(**named, return_dict=True, **options), loss_options


def _shown(output: Any) -> dict[str, Any]:
    """Hidden states and attention matrices of the base model, None unless asked for."""
    return {"hidden_states": output.hidden_states, "attentions": output.attentions}


def _run_rows(model: Any, inputs: _Inputs, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`_run` for a head that answers once for each row; refuses packed rows."""
    check_not_sharded(type(model).__name__)
    input_ids, attention_mask, position_ids, sequence_ids, inputs_embeds = inputs
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens is not None:
        starts = sequence_starts(
            (tokens.shape[0], tokens.shape[1]),
            device=tokens.device,
            position_ids=position_ids,
            sequence_ids=sequence_ids,
            masked=attention_mask is not None,
            packing={name: options[name] for name in PACKING if name in options},
        )
        if starts is not None:
            raise ValueError(
                f"{type(model).__name__} answers once for each row, but the rows hold packed "
                "sequences (position_ids that begin again, cu_seq_lens_q, seq_idx or "
                "sequence_ids): pass a padded batch with an attention_mask"
            )
    return _run(model, inputs, {**options, "use_cache": False})


def mean_pool(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``(B, L, width)`` over the tokens with a nonzero mask ``(B, L)``; None = all.

    A row without tokens gives zeros.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    if mask is None:
        return hidden_states.to(dtype).mean(1).to(hidden_states.dtype)
    weights = mask.to(dtype).unsqueeze(-1)
    total = (hidden_states.to(dtype) * weights).sum(1)
    return (total / torch.clamp_min(weights.sum(1), 1.0)).to(hidden_states.dtype)
