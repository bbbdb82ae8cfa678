"""Configuration of a Performer model."""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from performers.features import ESTIMATORS, PROJECTIONS
from performers.features.projections import Projection
from performers.features.softmax import Estimator
from performers.models.registry import ATTENTIONS

POSITIONS = ("rotary", "sinusoidal", "learned", "axial")
_TABLES = ("learned", "axial")

_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "num_features": 1,
    "window": 0,
    "position_window": 0,
    "sinks": 0,
    "chunk_size_feed_forward": 0,
}

# Fields of configurations that earlier versions saved, and the options that they are now.
_FORMER_FIELDS = {
    "linformer": {"linformer_rank": "rank"},
    "lsh": {"lsh_buckets": "buckets", "lsh_chunk_size": "chunk_size", "lsh_rounds": "rounds"},
    "local": {"window": "window"},
    "bigbird": {
        "bigbird_block_size": "block_size",
        "bigbird_global_blocks": "global_blocks",
        "bigbird_random_blocks": "random_blocks",
    },
}


class PerformerConfig(PreTrainedConfig):
    """Configuration of a Performer model.

    The defaults are the paper's regular model (Choromanski et al. 2021, section 4.1) with a
    protein vocabulary.

    Other options are those of all transformers configurations.

    Attributes:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Width of the model.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; divides ``hidden_size``.
        intermediate_size: Width inside the feed-forward blocks.
        hidden_act: Activation of the feed-forward blocks, by its transformers name.
        hidden_dropout_prob: Dropout on embeddings and on each block's two outputs.
        position_embedding: ``"rotary"``, ``"sinusoidal"``, ``"learned"``, or ``"axial"``: the sum
            of a learned vector for each coordinate of a place in a grid, see ``axial_shape``.
        max_position_embeddings: Longest input; a hard limit for learned and axial positions and
            registered attentions of a fixed length only, see ``longest_input``.
        axial_shape: Sizes of the axes of axial positions, the outermost first, such as rows,
            columns and channels of images in raster order; their product is
            ``max_position_embeddings``. None for all other positions.
        rope_theta: Base of the rotary wavelengths.
        attention: ``"favor-softmax"``; ``"favor-relu"`` or another of the generalized kernels;
            ``"exact"`` for softmax attention; ``"identity"`` for attention that returns its
            values, the most that any attention could save; or one that was added with
            ``register_attention``.
        attention_options: Options of a registered mechanism, see ``register_attention``; missing
            ones have their defaults.
        num_features: Random features per head; None takes the feature map's default.
        estimator: Softmax estimator, see ``SoftmaxFeatures``.
        projection: Distribution of the projection, see ``draw_projection``; None for generalized
            kernels without one.
        regularized: Fixed row lengths for softmax features (SMREG).
        window: ``favor-softmax`` only: tokens at most this far apart attend to each other exactly.
            None is features alone.
        position_window: ``favor-softmax`` only, not causal: the second half of the heads attend
            exactly to the tokens whose ``position_ids`` are at most this far from their own, and
            have no ``window``. Where members of a row have positions that each begin at 0, as
            unaligned relatives do, those are the tokens at and beside the same place of all of
            them; where one sequence is a row, it is ``window`` for these heads. Time and memory
            are those of a window of as many tokens. None for no such heads.
        sinks: ``favor-softmax`` only: every token attends exactly to the first ``sinks`` ones.
        exact_layers: Favor attentions only: layers, from 0, that have softmax attention in place
            of it; None for none.
        kernel_epsilon: Added to every generalized feature.
        features_per_head: Draw a projection per head rather than one per layer.
        reversible: Residual blocks in two streams, ``y1 = x1 + attention(norm(x2))`` and
            ``y2 = x2 + mlp(norm(y1))``, from two copies of the embeddings to the mean of both
            (Gomez et al. 2017; Kitaev et al. 2020). The backward pass recomputes activations from
            those of the last block, so that depth costs no activation memory. The weights are those
            of an ordinary model, the function is another. Hooks on blocks are refused, see
            ``run_reversible``.
        chunk_size_feed_forward: Number of tokens that feed-forward blocks process at a time, with
            inner activations recomputed in the backward pass; 0 for all at once.
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of initial weights.
        is_decoder: Attention is causal.
        use_cache: Causal models return their recurrent state; attentions to compare with have
            none, and generation reads the whole row again for each token.
        tie_word_embeddings: The output layer shares the input embedding.
        pad_token_id: Padding token.
        bos_token_id: First token of a sequence.
        eos_token_id: Last token of a sequence.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    model_type = "performer"
    # transformers adds to a list; the cache has either name.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    vocab_size: int = 31
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    position_embedding: str = "rotary"
    max_position_embeddings: int = 8192
    axial_shape: Sequence[int] | None = None
    rope_theta: float = 10000.0
    attention: str = "favor-softmax"
    attention_options: dict[str, Any] = field(default_factory=dict)
    num_features: int | None = None
    estimator: Estimator = "positive"
    projection: Projection | None = "orthogonal"
    regularized: bool = False
    window: int | None = None
    position_window: int | None = None
    sinks: int = 0
    exact_layers: Sequence[int] | None = None
    kernel_epsilon: float = 1e-3
    features_per_head: bool = False
    reversible: bool = False
    chunk_size_feed_forward: int = 0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    is_decoder: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        """Check all options; ``kwargs`` are those common to transformers configurations."""
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"attention must be one of {tuple(ATTENTIONS)}, got {self.attention!r}; import the "
                "package that registers it, if it is one of another package (register_attention)"
            )
        for name, choices in (
            ("position_embedding", POSITIONS),
            ("estimator", ESTIMATORS),
            ("projection", (*PROJECTIONS, None)),
            ("hidden_act", tuple(ACT2FN)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            size = getattr(self, name)
            if size is not None and size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
        if not 0 <= (probability := self.hidden_dropout_prob) < 1:
            raise ValueError(
                f"hidden_dropout_prob must be at least 0 and below 1, got {probability}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be None or below vocab_size ({self.vocab_size}), got "
                f"{self.pad_token_id}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise ValueError(
                "rotary positions need an even head_dim (hidden_size / num_attention_heads), got "
                f"{self.head_dim}"
            )
        self._check_axial_shape()
        if self.projection is None and self.attention == "favor-softmax":
            raise ValueError("projection must not be None for favor-softmax")
        entry = ATTENTIONS[self.attention]
        entry.check_causal(self.is_decoder)
        former = self._take_former_options(kwargs)
        exact_terms = self.sinks or self.window is not None
        if exact_terms and self.attention != "favor-softmax":
            raise ValueError(
                f"window and sinks need attention='favor-softmax', got {self.attention!r} with "
                f"window={self.window} and sinks={self.sinks}"
            )
        self._check_position_window()
        self._check_exact_layers()
        self.attention_options = entry.complete_options({**former, **self.attention_options})
        super().__post_init__(**kwargs)

    def _check_axial_shape(self) -> None:
        """Check that ``axial_shape`` goes with the positions, and make it a list, or None."""
        shape = None if self.axial_shape is None else list(self.axial_shape)
        self.axial_shape = shape
        if self.position_embedding != "axial":
            if shape is not None:
                raise ValueError(
                    f"axial_shape={shape} needs position_embedding='axial', got "
                    f"{self.position_embedding!r}"
                )
            return
        # Not isinstance: True would be an axis of size 1.
        if not shape or any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(
                "axial_shape must be the sizes of the axes of a grid, such as (64, 64, 3), for "
                f"position_embedding='axial', got {shape}"
            )
        if math.prod(shape) != self.max_position_embeddings:
            raise ValueError(
                f"axial_shape={shape} has {math.prod(shape)} places, but max_position_embeddings "
                f"is {self.max_position_embeddings}: make them equal"
            )

    def _check_position_window(self) -> None:
        """Check that ``position_window`` goes with the attention and the heads."""
        if self.position_window is None:
            return
        found = f"got position_window={self.position_window} with "
        if self.attention != "favor-softmax":
            raise ValueError(
                f"position_window needs attention='favor-softmax', {found}{self.attention!r}"
            )
        if self.is_decoder:
            raise ValueError(
                f"position_window has no causal form, {found}is_decoder=True: tokens at one "
                "position come before and after each other in a row; leave it out"
            )
        if self.num_attention_heads < 2:
            raise ValueError(
                f"position_window is for half of the heads, {found}num_attention_heads="
                f"{self.num_attention_heads}: use 2 at least"
            )

    def _check_exact_layers(self) -> None:
        """Check ``exact_layers`` and make them a sorted list, or None."""
        layers, count = list(self.exact_layers or ()), self.num_hidden_layers
        if layers and not self.attention.startswith("favor-"):
            raise ValueError(
                "exact_layers needs a favor attention that the other layers have, got "
                f"{self.attention!r} with exact_layers={layers}"
            )
        # Not isinstance: True would be layer 1.
        if any(type(layer) is not int or not 0 <= layer < count for layer in layers):
            raise ValueError(
                f"exact_layers must be indices of the model's {count} layers, 0..{count - 1}, got "
                f"{layers}"
            )
        self.exact_layers = sorted(set(layers)) or None

    def _take_former_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of the attention that earlier versions saved as fields."""
        options = {}
        for attention, names in _FORMER_FIELDS.items():
            for former, option in names.items():
                value = kwargs.pop(former, getattr(self, former, None))
                if attention == self.attention and value is not None:
                    options[option] = value
        if ATTENTIONS[self.attention].options is None:
            return {}
        if "window" in options:
            self.window = None
        return options

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def projected_heads(self) -> int | None:
        """Number of projections if each head has one, or None if all heads share one."""
        return self.num_attention_heads if self.features_per_head else None

    @property
    def has_position_table(self) -> bool:
        """True if positions are learned tables, which end with the longest input."""
        return self.position_embedding in _TABLES

    @property
    def longest_input(self) -> int | None:
        """Length limit of tables of positions and of some mechanisms, or None."""
        limited = self.has_position_table or ATTENTIONS[self.attention].fixed_length
        return self.max_position_embeddings if limited else None

    def layer_attention(self, layer: int) -> str:
        """The attention of one layer: ``attention``, or ``"exact"`` in ``exact_layers``."""
        return "exact" if layer in (self.exact_layers or ()) else self.attention
