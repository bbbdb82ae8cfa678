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
            **kwargs: Options of the loss, and what else ``PerformerModel.forward`` takes.

        Returns:
            Loss, logits and what else was asked for.
        """
        loss_options = take_loss_options(kwargs)
        output = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            sequence_ids=sequence_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options
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
        cache: Any = None,
        **kwargs: Any,
    ) -> PerformerCausalLMOutput | tuple[Any, ...]:
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
            cache: Likewise.
            **kwargs: Options of the loss, and what else ``PerformerModel.forward`` takes.

        Returns:
            Loss, logits, cache and what else was asked for.
        """
        loss_options = take_loss_options(kwargs)
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
            cache=cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_options
            )
        return self._finish(
            PerformerCausalLMOutput(
                loss=loss,
                logits=logits,
                hidden_states=output.hidden_states,
                attentions=output.attentions,
                **{CACHE_KEYWORD: getattr(output, CACHE_KEYWORD)},
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

        Raises:
            ValueError: Rows are packed: there is one label for a row.
        """
        loss_options = take_loss_options(kwargs)
        check_one_sequence(self, input_ids, inputs_embeds, attention_mask, position_ids, kwargs)
        output = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(mean_pool(output.last_hidden_state, attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **loss_options
            )
        result = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return self._finish(result, return_dict)


class PerformerForTokenClassification(PerformerPreTrainedModel):
    """A label per token, such as the secondary structure of each residue."""

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
        sequence_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits ``(B, L, num_labels)`` and, with labels, the mean cross entropy.

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
            **kwargs: Options of the loss, and what else ``PerformerModel.forward`` takes.

        Returns:
            Loss, logits and what else was asked for.
        """
        loss_options = take_loss_options(kwargs)
        output = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            sequence_ids=sequence_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **loss_options)
        result = TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return self._finish(result, return_dict)


class PerformerForQuestionAnswering(PerformerPreTrainedModel):
    """The first and last token of an answer within its context."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.performer = PerformerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Scores of each token as first and as last of the answer, ``(B, L)`` each.

        Args:
            input_ids: See ``PerformerModel.forward``, as for the others not listed here.
            attention_mask: Likewise.
            position_ids: Likewise.
            inputs_embeds: Likewise.
            start_positions: Shape ``(B,)``: index of the answer's first token; indices beyond the
                row have no loss.
            end_positions: Shape ``(B,)``: index of its last token.
            output_attentions: Likewise.
            output_hidden_states: Likewise.
            return_dict: Likewise.
            **kwargs: Options of the loss.

        Returns:
            Loss (mean of both cross entropies), both scores and what else was asked for.

        Raises:
            ValueError: One of the two positions is missing, or rows are packed.
        """
        loss_options = take_loss_options(kwargs)
        if (start_positions is None) != (end_positions is None):
            raise ValueError("pass both start_positions and end_positions, or neither")
        check_one_sequence(self, input_ids, inputs_embeds, attention_mask, position_ids, kwargs)
        output = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        starts, ends = self.qa_outputs(output.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None:
            loss = self.loss_function(starts, ends, start_positions, end_positions, **loss_options)
        result = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=starts.contiguous(),
            end_logits=ends.contiguous(),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return self._finish(result, return_dict)


def check_one_sequence(
    model: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    options: dict[str, Any],
) -> None:
    """Refuse packed rows in a model that answers once for each row.

    Raises:
        ValueError: Some argument tells of packed sequences.
    """
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None:
        return
    starts = sequence_starts(
        (inputs.shape[0], inputs.shape[1]),
        device=inputs.device,
        position_ids=position_ids,
        sequence_ids=options.get("sequence_ids"),
        masked=attention_mask is not None,
        packing={name: options[name] for name in PACKING if name in options},
    )
    if starts is not None:
        raise ValueError(
            f"{type(model).__name__} answers once for each row, but the rows hold packed sequences "
            "(position_ids that begin again, cu_seq_lens_q, seq_idx or sequence_ids): pass a "
            "padded batch with an attention_mask"
        )


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
