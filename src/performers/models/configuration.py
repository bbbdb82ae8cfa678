"""Configuration of a Performer model."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from performers.features import ESTIMATORS, FUNCTIONS, PROJECTIONS
from performers.features.projections import Projection
from performers.features.softmax import Estimator

POSITIONS = ("rotary", "sinusoidal", "learned")
ATTENTIONS = ("favor-softmax", *(f"favor-{name}" for name in FUNCTIONS), "exact", "identity")


class PerformerConfig(PreTrainedConfig):
    """What a Performer model is made of.

    The defaults are the paper's regular model (Choromanski et al. 2021, section 4.1) with a
    protein vocabulary.

    Args:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Width of the model.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads; divides ``hidden_size``.
        intermediate_size: Width inside the feed-forward blocks.
        hidden_act: Activation of the feed-forward blocks, by its transformers name.
        hidden_dropout_prob: Dropout on embeddings and on each block's two outputs.
        position_embedding: ``"rotary"``, ``"sinusoidal"`` or ``"learned"``.
        max_position_embeddings: Longest input; a hard limit for learned positions only.
        rope_theta: Base of the rotary wavelengths.
        attention: ``"favor-softmax"``; ``"favor-relu"`` or another of the generalized kernels;
            ``"exact"`` for softmax attention; ``"identity"`` for attention that returns its
            values, the most that any attention could save.
        num_features: Random features per head; None takes the feature map's default.
        estimator: Softmax estimator, see ``SoftmaxFeatures``.
        projection: How features are drawn, see ``draw_projection``; None for generalized kernels
            without a projection.
        regularized: Fixed row lengths for softmax features (SMREG).
        window: ``favor-softmax`` only: tokens at most this far apart attend to each other exactly;
            None for features alone.
        sinks: ``favor-softmax`` only: every token attends exactly to the first ``sinks`` ones.
        exact_layers: Favor attentions only: layers, from 0, that have softmax attention in place
            of it; None for none.
        kernel_epsilon: Added to every generalized feature.
        features_per_head: Draw a projection per head rather than one per layer.
        layer_norm_eps: Of the layer norms.
        initializer_range: Standard deviation of initial weights.
        is_decoder: Attention is causal.
        use_cache: Causal models return their recurrent state.
        tie_word_embeddings: The output layer shares the input embedding.
        pad_token_id: Padding token.
        bos_token_id: First token of a sequence.
        eos_token_id: Last token of a sequence.
        **kwargs: Options common to all transformers configurations.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    model_type = "performer"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 31,
        hidden_size: int = 512,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        intermediate_size: int = 2048,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        position_embedding: str = "rotary",
        max_position_embeddings: int = 8192,
        rope_theta: float = 10000.0,
        attention: str = "favor-softmax",
        num_features: int | None = None,
        estimator: Estimator = "positive",
        projection: Projection | None = "orthogonal",
        regularized: bool = False,
        window: int | None = None,
        sinks: int = 0,
        exact_layers: Iterable[int] | None = None,
        kernel_epsilon: float = 1e-3,
        features_per_head: bool = False,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        is_decoder: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        **kwargs: Any,
    ) -> None:
        for name, value, choices in (
            ("attention", attention, ATTENTIONS),
            ("position_embedding", position_embedding, POSITIONS),
            ("estimator", estimator, ESTIMATORS),
            ("projection", projection, (*PROJECTIONS, None)),
            ("hidden_act", hidden_act, tuple(ACT2FN)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        for name, size in (
            ("vocab_size", vocab_size),
            ("hidden_size", hidden_size),
            ("num_hidden_layers", num_hidden_layers),
            ("intermediate_size", intermediate_size),
            ("max_position_embeddings", max_position_embeddings),
            ("num_features", num_features),
        ):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= hidden_dropout_prob < 1:
            raise ValueError(
                f"hidden_dropout_prob must be at least 0 and below 1, got {hidden_dropout_prob}"
            )
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise ValueError(
                f"pad_token_id must be None or below vocab_size ({vocab_size}), got {pad_token_id}"
            )
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, got "
                f"{hidden_size} and {num_attention_heads}"
            )
        if position_embedding == "rotary" and (hidden_size // num_attention_heads) % 2:
            raise ValueError(
                "rotary positions need an even head_dim (hidden_size / num_attention_heads), got "
                f"{hidden_size // num_attention_heads}"
            )
        if projection is None and attention == "favor-softmax":
            raise ValueError("projection must not be None for favor-softmax")
        if (window is not None or sinks) and attention != "favor-softmax":
            raise ValueError(
                f"window and sinks need attention='favor-softmax', got {attention!r} with "
                f"window={window} and sinks={sinks}"
            )
        for name, reach in (("window", window), ("sinks", sinks)):
            if reach is not None and reach < 0:
                raise ValueError(f"{name} must be at least 0, got {reach}")
        exact_layers = _checked_layers(exact_layers, attention, num_hidden_layers)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.position_embedding = position_embedding
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.attention = attention
        self.num_features = num_features
        self.estimator = estimator
        self.projection = projection
        self.regularized = regularized
        self.window = window
        self.sinks = sinks
        self.exact_layers = exact_layers
        self.kernel_epsilon = kernel_epsilon
        self.features_per_head = features_per_head
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.is_decoder = is_decoder
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
        # Not all releases of transformers 5 keep these in the base class.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    def layer_attention(self, layer: int) -> str:
        """The attention of one layer: ``attention``, or ``"exact"`` in ``exact_layers``."""
        return "exact" if layer in (self.exact_layers or ()) else self.attention


def _checked_layers(
    layers: Iterable[int] | None, attention: str, num_hidden_layers: int
) -> list[int] | None:
    """The layers in order, as a list that JSON can hold; None for none."""
    found = list(layers or ())
    if not found:
        return None
    if not attention.startswith("favor-"):
        raise ValueError(
            f"exact_layers needs a favor attention that the other layers have, got {attention!r} "
            f"with exact_layers={found}"
        )
    # Not isinstance: True would be layer 1.
    if any(type(layer) is not int or not 0 <= layer < num_hidden_layers for layer in found):
        raise ValueError(
            f"exact_layers must be indices of the model's {num_hidden_layers} layers, "
            f"0..{num_hidden_layers - 1}, got {found}"
        )
    return sorted(set(found))
