"""Heads: masked and causal language modelling, sequence classification."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)

from performers.models.configuration import COMPARATORS, PerformerConfig
from performers.models.modeling import PerformerModel, PerformerPreTrainedModel


class _LanguageModel(PerformerPreTrainedModel):
    """A Performer whose output layer shares the input embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "performer.embeddings.weight"}

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.performer = PerformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings


class PerformerForMaskedLM(_LanguageModel):
    """Predicts the tokens hidden behind the mask token; attention is bidirectional."""

    def __init__(self, config: PerformerConfig) -> None:
        if config.is_decoder:
            raise ValueError(
                "PerformerForMaskedLM needs bidirectional attention: set config.is_decoder=False"
            )
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits ``(B, L, vocab_size)`` and, with labels, the mean cross entropy.

        Args:
            input_ids: See ``PerformerModel.forward``, as for the others not listed here.
            attention_mask: Likewise.
            position_ids: Likewise.
            sequence_ids: Likewise.
            inputs_embeds: Likewise.
            labels: Shape ``(B, L)``; -100 where no prediction is asked for.
            output_attentions: Likewise.
            output_hidden_states: Likewise.
            return_dict: Likewise.
            **kwargs: Options of the loss.

        Returns:
            Loss, logits and what else was asked for.
        """
        output = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            sequence_ids=sequence_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return self._finish(
            MaskedLMOutput(
                loss=loss,
                logits=logits,
                hidden_states=output.hidden_states,
                attentions=output.attentions,
            ),
            return_dict,
        )


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

        Attentions without a cache (``COMPARATORS``) read the whole row again for each token,
        whatever ``generation_config.use_cache`` is: a copy of a model's own has True in it.

        Raises:
            ValueError: ``use_cache=True`` was asked for and the attention has no cache.
        """
        attention = self.config.attention
        if attention in COMPARATORS:
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits ``(B, L, vocab_size)`` and, with labels, the mean cross entropy of the next token.

        Args:
            input_ids: See ``PerformerModel.forward``, as for the others not listed here.
            attention_mask: Likewise.
            position_ids: Likewise.
            sequence_ids: Likewise.
            inputs_embeds: Likewise.
            past_key_values: Likewise.
            labels: Shape ``(B, L)``, aligned with ``input_ids`` (shifted inside); -100 = ignore.
            use_cache: Likewise.
            output_attentions: Likewise.
            output_hidden_states: Likewise.
            return_dict: Likewise.
            logits_to_keep: Compute logits for the last so many tokens only; 0 = all.
            **kwargs: Options of the loss.

        Returns:
            Loss, logits, cache and what else was asked for.
        """
        output = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            sequence_ids=sequence_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return self._finish(
            CausalLMOutputWithPast(
                loss=loss,
                logits=logits,
                past_key_values=output.past_key_values,
                hidden_states=output.hidden_states,
                attentions=output.attentions,
            ),
            return_dict,
        )


class PerformerForSequenceClassification(PerformerPreTrainedModel):
    """A label per sequence, read from the mean of its final hidden states."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.performer = PerformerModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits ``(B, num_labels)`` and, with labels, the loss for ``config.problem_type``.

        Args:
            input_ids: See ``PerformerModel.forward``, as for the others not listed here.
            attention_mask: Likewise; padding does not enter the mean.
            position_ids: Likewise.
            inputs_embeds: Likewise.
            labels: Shape ``(B,)`` of classes or values, or ``(B, num_labels)`` for several labels.
            output_attentions: Likewise.
            output_hidden_states: Likewise.
            return_dict: Likewise.
            **kwargs: Options of the loss.

        Returns:
            Loss, logits and what else was asked for.
        """
        output = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(mean_pool(output.last_hidden_state, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        result = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return self._finish(result, return_dict)


def mean_pool(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that take part.

    Args:
        hidden_states: Shape ``(B, L, width)``.
        mask: Shape ``(B, L)``, nonzero = takes part; None = all.

    Returns:
        Shape ``(B, width)``; zeros for a row without tokens.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    if mask is None:
        return hidden_states.to(dtype).mean(1).to(hidden_states.dtype)
    weights = mask.to(dtype).unsqueeze(-1)
    total = (hidden_states.to(dtype) * weights).sum(1)
    return (total / torch.clamp_min(weights.sum(1), 1.0)).to(hidden_states.dtype)
