"""Configuration of a Performer model."""

from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from performers.features import ESTIMATORS, PROJECTIONS
from performers.features.projections import Projection
from performers.features.softmax import Estimator
from performers.models.registry import ATTENTIONS

POSITIONS = ("rotary", "sinusoidal", "learned")


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
        max_position_embeddings: Longest input; a hard limit for learned positions and
            ``linformer`` only, see ``longest_input``.
        rope_theta: Base of the rotary wavelengths.
        attention: ``"favor-softmax"``; ``"favor-relu"`` or another of the generalized kernels;
            ``"exact"`` for softmax attention; ``"identity"`` for attention that returns its
            values, the most that any attention could save; ``"linformer"``, ``"lsh"`` (Reformer),
            ``"local"`` (a sliding window) and ``"bigbird"`` to compare with, see
            ``performers.models.comparators``. With ``"lsh"`` a layer's queries are its keys too,
            and its fused projection has two parts and not three.
        num_features: Random features per head; None takes the feature map's default.
        estimator: Softmax estimator, see ``SoftmaxFeatures``.
        projection: How features are drawn, see ``draw_projection``; None for generalized kernels
            without a projection.
        regularized: Fixed row lengths for softmax features (SMREG).
        window: ``favor-softmax`` and ``local`` only: tokens at most this far apart attend to each
            other exactly. None is features alone in the first and 128 in the second.
        sinks: ``favor-softmax`` only: every token attends exactly to the first ``sinks`` ones.
        exact_layers: Favor attentions only: layers, from 0, that have softmax attention in place
            of it; None for none.
        kernel_epsilon: Added to every generalized feature.
        features_per_head: Draw a projection per head rather than one per layer; ``lsh`` draws its
            hashes so too.
        linformer_rank: Keys and values that ``linformer`` projects a sequence to; None is 256, or
            ``max_position_embeddings`` where that is less.
        lsh_buckets: Buckets that ``lsh`` hashes into, even or 1; None is the least power of two
            with ``lsh_chunk_size`` tokens a bucket or fewer at ``max_position_embeddings``. The
            number does not depend on the input, so that a token sees the same however long the
            row becomes.
        lsh_chunk_size: How far a token sees, to each side, among those of its bucket.
        lsh_rounds: Hashes, the union of whose buckets ``lsh`` attends to.
        bigbird_block_size: Tokens in a block of ``bigbird``.
        bigbird_global_blocks: First blocks of a sequence that see all and that all see.
        bigbird_random_blocks: Random blocks that each block sees.
        reversible: Residual blocks in two streams, ``y1 = x1 + attention(norm(x2))`` and
            ``y2 = x2 + mlp(norm(y1))``, from two copies of the embeddings to the mean of both
            (Gomez et al. 2017; Kitaev et al. 2020): activations are computed again in the backward
            pass from those of the last block, so that depth costs no activation memory, except
            for the buckets of ``lsh``. The weights are those of an ordinary model, the function
            is another. Hooks on blocks are refused, see ``run_reversible``.
        chunk_size_feed_forward: Tokens that feed-forward blocks work on at a time, whose inner
            activations are computed again in the backward pass; 0 for all at once.
        layer_norm_eps: Of the layer norms.
        initializer_range: Standard deviation of initial weights.
        is_decoder: Attention is causal.
        use_cache: Causal models return their recurrent state; attentions to compare with have
            none, and generation reads the whole row again for each token.
        tie_word_embeddings: The output layer shares the input embedding.
        pad_token_id: Padding token.
        bos_token_id: First token of a sequence.
        eos_token_id: Last token of a sequence.
        **kwargs: Options common to all transformers configurations.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    model_type = "performer"
    # transformers adds to a list; the cache has either name.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

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
        linformer_rank: int | None = None,
        lsh_buckets: int | None = None,
        lsh_chunk_size: int = 64,
        lsh_rounds: int = 4,
        bigbird_block_size: int = 64,
        bigbird_global_blocks: int = 2,
        bigbird_random_blocks: int = 3,
        reversible: bool = False,
        chunk_size_feed_forward: int = 0,
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
            ("attention", attention, tuple(ATTENTIONS)),
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
            ("linformer_rank", linformer_rank),
            ("lsh_buckets", lsh_buckets),
            ("lsh_chunk_size", lsh_chunk_size),
            ("lsh_rounds", lsh_rounds),
            ("bigbird_block_size", bigbird_block_size),
        ):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        for name, size in (
            ("bigbird_global_blocks", bigbird_global_blocks),
            ("bigbird_random_blocks", bigbird_random_blocks),
            ("chunk_size_feed_forward", chunk_size_feed_forward),
        ):
            if size < 0:
                raise ValueError(f"{name} must be at least 0, got {size}")
        if lsh_buckets is not None and lsh_buckets > 1 and lsh_buckets % 2:
            raise ValueError(f"lsh_buckets must be even, or 1, got {lsh_buckets}")
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
        ATTENTIONS[attention].check_causal(attention, is_decoder)
        windowed = attention in ("favor-softmax", "local")
        if (window is not None and not windowed) or (sinks and attention != "favor-softmax"):
            raise ValueError(
                "window and sinks need attention='favor-softmax' (window also goes with 'local'), "
                f"got {attention!r} with window={window} and sinks={sinks}"
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
        self.linformer_rank = linformer_rank
        self.lsh_buckets = lsh_buckets
        self.lsh_chunk_size = lsh_chunk_size
        self.lsh_rounds = lsh_rounds
        self.bigbird_block_size = bigbird_block_size
        self.bigbird_global_blocks = bigbird_global_blocks
        self.bigbird_random_blocks = bigbird_random_blocks
        self.reversible = reversible
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
        self.chunk_size_feed_forward = chunk_size_feed_forward
        # Not all releases of transformers 5 keep these in the base class.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def projected_heads(self) -> int | None:
        """Heads with a projection of their own, or None when all share one."""
        return self.num_attention_heads if self.features_per_head else None

    @property
    def longest_input(self) -> int | None:
        """Most tokens in a sequence: a limit of learned positions and of ``linformer``, or None."""
        limited = self.position_embedding == "learned" or self.attention == "linformer"
        return self.max_position_embeddings if limited else None

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
