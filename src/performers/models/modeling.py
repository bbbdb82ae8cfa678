"""The Performer as a transformers model: pre-norm blocks around a chosen attention."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from performers.attention.sharding import current_sharding
from performers.features import FeatureMap, SoftmaxFeatures
from performers.models.arguments import (
    CACHE_KEYWORD,
    PACKING,
    boundaries,
    check_cache_position,
    check_no_others,
    either_cache,
    is_tracing,
    sequence_starts,
    with_both_cache_names,
)
from performers.models.attention import ResidualLinear
from performers.models.block import PerformerBlock, run_blocks
from performers.models.cache import PerformerCache
from performers.models.configuration import PerformerConfig
from performers.models.context import AttentionContext
from performers.models.manifest import MANIFEST, check_manifest
from performers.models.positions import (
    AxialPositions,
    LearnedPositions,
    counts_up,
    rotary_angles,
    sinusoids,
)
from performers.models.registry import ATTENTIONS
from performers.models.reversible import run_reversible


@with_both_cache_names
@dataclass
class PerformerModelOutput(BaseModelOutputWithPast):
    """Final hidden states, the cache and what else was asked for."""


class PerformerPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving common to all Performer models."""

    config_class = PerformerConfig
    base_model_prefix = "performer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embeddings"
    _no_split_modules: ClassVar[list[str]] = ["PerformerBlock"]
    # Assisted decoding removes tokens from the past, which a sum does not allow.
    _is_stateful = True
    # Rounded to half precision, the rows of a projection are no longer orthogonal.
    _keep_in_fp32_modules_strict = ("feature_map",)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model; weights are read from safetensors files only.

        Raises:
            ValueError: ``use_safetensors=False`` was asked for, or a file of the folder differs
                from its manifest.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "use_safetensors must not be False: pickled weights can run any code and are not "
                "read; save the model again as safetensors"
            )
        kwargs["use_safetensors"] = True
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if place is not None and Path(place).is_dir():
            check_manifest(Path(place))
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the model and remove the manifest of the files that it replaces."""
        (Path(save_directory) / MANIFEST).unlink(missing_ok=True)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, FeatureMap):
            if not _loaded([module.weight]):
                module.redraw_()
            fit = [tensor for name, tensor in module.named_buffers() if name != "weight"]
            if isinstance(module, SoftmaxFeatures) and not _loaded(fit):
                # The memory of a fit that the file lacks is not initialised.
                module.reset_calibration_()
            return
        super()._init_weights(module)
        # A mechanism with parameters; transformers initialises the modules of torch.
        kind = type(module)
        draws = "reset_parameters" in vars(kind) and not kind.__module__.startswith("torch.")
        if draws and not _loaded(module.parameters()):
            module.reset_parameters()
        if isinstance(module, ResidualLinear):
            scale = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            initialization.normal_(module.weight, std=scale)


class PerformerModel(PerformerPreTrainedModel):
    """Token embeddings, blocks and a final norm, without a head."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.positions: nn.Module | None = None
        if config.position_embedding == "learned":
            self.positions = LearnedPositions(config.max_position_embeddings, config.hidden_size)
        elif config.position_embedding == "axial":
            self.positions = AxialPositions(config.axial_shape or (), config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            PerformerBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: PerformerCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: PerformerCache | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> PerformerModelOutput:
        """Hidden states of the last layer.

        Args:
            input_ids: Shape ``(B, L)``.
            attention_mask: Shape ``(B, L)``, or with the columns of the past before them; 0 =
                padding.
            position_ids: Shape ``(B, L)``; by default padding is not counted, and packed sequences
                start at 0. Without an ``attention_mask``, positions that restart at 0 mark packed
                sequences.
            sequence_ids: Shape ``(B, L)``; neighbouring tokens with different ids belong to
                different packed sequences, which do not see each other.
            inputs_embeds: Shape ``(B, L, hidden_size)``, instead of ``input_ids``.
            past_key_values: Cache returned by an earlier call, also named ``cache``.
            use_cache: Return a cache (causal models only).
            output_attentions: Return each layer's attention matrix ``(B, H, L, L)``, the one that
                the random features imply (quadratic).
            output_hidden_states: Return the hidden states before each block and after the last;
                of reversible blocks the mean of both streams. These keep all activations in
                training if this or ``output_attentions`` is asked for.
            cache: ``past_key_values`` under its name in transformers 5.24 and later.
            cache_position: Position of the first token after those of the cache; only checked.
            **kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``seq_idx``, ``max_length_q`` and
                ``max_length_k`` of transformers' padding-free collators, see ``sequence_ids``;
                ``return_dict=False`` for a tuple in place of a ``ModelOutput``.

        Returns:
            Final hidden states ``(B, L, hidden_size)`` and what was asked for.

        Raises:
            ValueError: Arguments do not go together, or a single token at a position beyond 0
                comes without the cache of what precedes it.
            TypeError: An argument is unknown.
        """
        config = self.config
        packing = {name: kwargs.pop(name) for name in PACKING if name in kwargs}
        check_no_others(self, kwargs)
        output_attentions = _default(output_attentions, config.output_attentions)
        output_hidden_states = _default(output_hidden_states, config.output_hidden_states)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        past = either_cache(past_key_values, cache)
        starts = sequence_starts(
            (hidden_states.shape[0], hidden_states.shape[1]),
            device=hidden_states.device,
            position_ids=position_ids,
            sequence_ids=sequence_ids,
            masked=attention_mask is not None or past is not None,
            packing=packing,
        )
        cache = self._cache(past, use_cache, packed=starts is not None)
        length = 0 if cache is None else cache.get_seq_length()
        check_cache_position(cache_position, length)
        if config.is_decoder and past is None:
            _check_first(hidden_states.shape[1], position_ids)
        sharding = current_sharding()
        if sharding is not None and position_ids is not None and attention_mask is None:
            sharding.tell_positions(position_ids)
        keys_are_gone = cache is not None and not cache.keeps_keys and length > 0
        if output_attentions and keys_are_gone:
            raise ValueError(
                "output_attentions is not available for a call that continues from a cache: the "
                "keys of the past are gone; run the whole sequence with use_cache=False"
            )
        context, position_ids = self._context(
            hidden_states, attention_mask, position_ids, starts, cache, output_attentions
        )
        hidden_states = self._with_positions(hidden_states, position_ids)
        hidden_states = self.dropout(hidden_states)
        run = run_reversible if config.reversible else run_blocks
        hidden_states, all_hidden_states, all_weights = run(
            self.layers, hidden_states, context, keep_hidden_states=output_hidden_states
        )
        hidden_states = self.final_norm(hidden_states)
        all_hidden_states.append(hidden_states)
        return PerformerModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            **{CACHE_KEYWORD: cache},
        )

    def new_cache(self) -> PerformerCache:
        """An empty cache for ``past_key_values``."""
        config = self.config
        exact = config.attention == "exact"
        return PerformerCache(
            config.attention,
            config.num_hidden_layers,
            config.exact_layers,
            memory=config.attention_options.get("memory") if exact else None,
        )

    def _cache(
        self, past: PerformerCache | None, use_cache: bool | None, *, packed: bool
    ) -> PerformerCache | None:
        if past is not None and not isinstance(past, PerformerCache):
            raise ValueError(
                "past_key_values must be the PerformerCache that an earlier call returned, got "
                f"{type(past).__name__}"
            )
        config = self.config
        if ATTENTIONS[config.attention].cache is None:
            if config.is_decoder and (use_cache or past is not None):
                raise ValueError(
                    f"attention={config.attention!r} has no cache: leave out use_cache=True and "
                    "past_key_values, and pass whole rows (generate() does so by itself)"
                )
            use_cache = False
        use_cache = _default(use_cache, config.use_cache and not self.training)
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            if config.reversible:
                raise ValueError(
                    "gradient checkpointing cannot be combined with reversible=True, which keeps "
                    "no activations anyway: call gradient_checkpointing_disable()"
                )
            # Blocks that run twice would count their tokens twice.
            if past is not None:
                raise ValueError("gradient checkpointing cannot be combined with past_key_values")
            use_cache = False
        if past is None and not (use_cache and config.is_decoder and not packed):
            return None
        if not config.is_decoder:
            raise ValueError("past_key_values needs a causal model (config.is_decoder=True)")
        if packed:
            raise ValueError(
                "packed sequences (sequence_ids, cu_seq_lens_q, seq_idx) cannot be combined with "
                "past_key_values: continue each sequence in a row of its own"
            )
        if past is None:
            return self.new_cache()
        theirs = past.attention, len(past), past.exact_layers
        ours = config.attention, config.num_hidden_layers, tuple(config.exact_layers or ())
        if theirs != ours:
            raise ValueError(
                "past_key_values is the cache of a model with attention={!r}, {} layers and "
                "exact_layers={}, but this one has {!r}, {} and {}".format(*theirs, *ours)
            )
        return past

    def _context(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        starts: Tensor | None,
        cache: PerformerCache | None,
        output_attentions: bool,
    ) -> tuple[AttentionContext, Tensor]:
        batch, length = hidden_states.shape[:2]
        device = hidden_states.device
        mask = None
        if attention_mask is not None:
            past = 0 if cache is None else cache.get_seq_length()
            if attention_mask.shape not in ((batch, length), (batch, past + length)):
                raise ValueError(
                    f"attention_mask must have shape ({batch}, {length})"
                    + (f" or ({batch}, {past + length})" if past else "")
                    + f", got {tuple(attention_mask.shape)}"
                )
            mask = _bool_mask(attention_mask)[:, attention_mask.shape[1] - length :].to(device)
        present = mask
        if present is None:
            present = torch.ones(batch, length, dtype=torch.bool, device=device)
        elif not is_tracing() and bool(present.all()):
            mask = None
        if cache is not None:
            positions = cache.extend(present)
        else:
            positions = (present.long().cumsum(-1) - 1).clamp_min(0)
        sequence_ids = cu_seqlens = None
        if starts is not None:
            # Runs are numbered, so that an id used twice in a row stays two sequences.
            sequence_ids = starts.long().cumsum(-1)
            index = torch.arange(length, device=device).expand(batch, -1)
            first = index.where(starts, 0).cummax(-1).values
            counts = present.long().cumsum(-1)
            before = (counts - present.long()).gather(-1, first)
            positions = (counts - before - 1).clamp_min(0)
            cu_seqlens = boundaries(starts)
        if position_ids is None:
            if current_sharding() is not None:
                raise ValueError(
                    "position_ids must be passed inside performers.distributed.sequence_parallel, "
                    "where a row begins on another rank: performers.distributed.shard makes them"
                )
            position_ids = positions
        rotary = None
        if self.config.position_embedding == "rotary":
            rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        may_count = starts is None and current_sharding() is None
        may_count = may_count and self.config.position_window is not None
        context = AttentionContext(
            is_causal=self.config.is_decoder,
            key_mask=mask,
            sequence_ids=sequence_ids,
            cu_seqlens=cu_seqlens,
            cache=cache,
            rotary=rotary,
            position_ids=position_ids.expand(batch, length),
            counts_up=may_count and counts_up(position_ids, present),
            need_weights=output_attentions,
        )
        return context, position_ids

    def _with_positions(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        if self.positions is not None:
            return hidden_states + self.positions(position_ids)
        if self.config.position_embedding == "sinusoidal":
            waves = sinusoids(position_ids, self.config.hidden_size) * self.config.initializer_range
            return hidden_states + waves.to(hidden_states.dtype)
        return hidden_states


def _loaded(tensors: Iterable[Any]) -> bool:
    return all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)


def _bool_mask(mask: Tensor) -> Tensor:
    """A mask of zeros and ones as bool; additive masks are refused."""
    if mask.dtype == torch.bool:
        return mask
    if not is_tracing() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "attention_mask must be bool or hold 0 (padding) and 1 only, got values from "
            f"{mask.min().item()} to {mask.max().item()}: additive masks and masks that number "
            "packed sequences have other names here (sequence_ids)"
        )
    return mask != 0


def _check_first(length: int, position_ids: Tensor | None) -> None:
    """Check that a first call is not a step of generation that lacks its past."""
    if length != 1 or position_ids is None or is_tracing() or current_sharding() is not None:
        return
    if bool((position_ids > 0).any()):
        raise ValueError(
            f"position_ids tell of a single token at position {int(position_ids.max())}, but the "
            f"call has no cache of the tokens before it: pass {CACHE_KEYWORD}, or the whole row"
        )


def _default(value: bool | None, default: bool) -> bool:
    return default if value is None else value
