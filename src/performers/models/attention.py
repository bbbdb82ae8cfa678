"""The attention mechanisms a model can be built with, behind one call."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from performers.attention.sharding import check_not_sharded
from performers.features import FUNCTIONS, GeneralizedFeatures, SoftmaxFeatures
from performers.models.arguments import is_tracing
from performers.models.cache import FavorCacheLayer
from performers.models.configuration import PerformerConfig
from performers.models.context import AttentionContext
from performers.models.positions import rotate
from performers.models.registry import ATTENTIONS, register_attention
from performers.nn import FavorAttention


class FavorMechanism(FavorAttention):
    """`FavorAttention` called with the context of a model's forward pass.

    Attributes:
        over_positions: The window is measured in positions, not in places of the row.
    """

    over_positions = False

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``; the matrix is ``(B, H, L, L)`` or None."""
        weights = self._weights(query, key, context) if context.need_weights else None
        entry = None if context.cache is None else context.cache.layers[layer]
        assert entry is None or isinstance(entry, FavorCacheLayer)
        # Not asked for while the compiler traces, which would compile again for each version.
        version = None if is_tracing() else self.feature_map.version
        if entry is not None and entry.state is not None:
            entry.check_version(version)
        out, state = super().forward(
            query,
            key,
            value,
            is_causal=context.is_causal,
            key_mask=context.key_mask,
            cu_seqlens=context.cu_seqlens,
            positions=self._window_positions(context),
            state=None if entry is None else entry.state,
            return_state=entry is not None,
        )
        if entry is not None and state is not None:
            entry.set_state(state, query.shape[-2], version)
        return out, weights

    def _window_positions(self, context: AttentionContext) -> Tensor | None:
        return context.position_ids if self.over_positions and not context.counts_up else None

    def _weights(self, query: Tensor, key: Tensor, context: AttentionContext) -> Tensor:
        if context.sequence_ids is not None and self.sinks:
            raise ValueError(
                "output_attentions is not available for packed sequences with sinks; pass one "
                "sequence in a row, or output_attentions=False"
            )
        weights = self.weights(
            query,
            key,
            is_causal=context.is_causal,
            key_mask=context.key_mask,
            positions=self._window_positions(context),
        )
        if context.sequence_ids is None:
            return weights
        ids = context.sequence_ids
        weights = weights * (ids[:, None, :, None] == ids[:, None, None, :])
        total = weights.sum(-1, keepdim=True)
        return weights / total.where(total != 0, 1.0)


class PositionWindowMechanism(nn.Module):
    """Heads with a window in the row, then as many with a window of positions.

    Attributes:
        near: Mechanism of the first half of the heads.
        across: Mechanism of the second half, see ``PerformerConfig.position_window``.
    """

    def __init__(self, near: FavorMechanism, across: FavorMechanism) -> None:
        super().__init__()
        self.near, self.across = near, across
        across.over_positions = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``; the matrix is ``(B, H, L, L)`` or None."""
        heads = query.shape[1]
        halves = (x.split((heads // 2, heads - heads // 2), dim=1) for x in (query, key, value))
        first, second = zip(*halves, strict=True)
        out, weights = self.near(*first, context, layer)
        more, more_weights = self.across(*second, context, layer)
        if weights is not None and more_weights is not None:
            weights = torch.cat((weights, more_weights), dim=1)
        return torch.cat((out, more), dim=1), weights


@dataclass
class ExactOptions:
    """Options of exact attention: ``memory``, the keys of the past that its cache keeps.

    Segment by segment that is the recurrence of Transformer-XL (Dai et al. 2019, arXiv
    1901.02860), but for two differences: keys and values are kept where the paper keeps hidden
    states and projects them anew, and relative positions are those of the model (rotary) and not
    the paper's bias. None keeps all keys.
    """

    memory: int | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"memory must be None or at least 1 key, got {self.memory}")


class ExactMechanism(nn.Module):
    """Softmax attention through torch's ``scaled_dot_product_attention``; see `ExactOptions`."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``; the matrix is ``(B, H, L, S)`` or None."""
        check_not_sharded('attention="exact"')
        key_mask = context.key_mask
        if context.cache is not None:
            key, value = context.cache.layers[layer].update(key, value)
            key_mask = context.cache.key_mask
        length, size = query.shape[-2], key.shape[-2]
        allowed = None
        if context.is_causal and length > 1:
            allowed = torch.ones(length, size, dtype=torch.bool, device=query.device)
            allowed = allowed.tril(size - length)[None, None]
        if key_mask is not None:
            padding = key_mask[:, None, None, :]
            allowed = padding if allowed is None else allowed & padding
        if context.sequence_ids is not None:
            ids = context.sequence_ids
            same = ids[:, None, :, None] == ids[:, None, None, :]
            allowed = same if allowed is None else allowed & same
        given = value
        if context.need_weights:
            # The matrix is the attention to unit vectors.
            units = torch.eye(size, dtype=value.dtype, device=value.device)
            given = units.expand(*key.shape[:2], -1, -1)
        plain = key_mask is None and context.sequence_ids is None
        if allowed is None or (plain and length == size):
            causal = allowed is not None
            out = F.scaled_dot_product_attention(query, key, given, is_causal=causal)
        else:
            # A row with nothing to attend to would be NaN: let it see all and clear it.
            blind = ~allowed.any(-1, keepdim=True)
            out = F.scaled_dot_product_attention(query, key, given, attn_mask=allowed | blind)
            out = out.masked_fill(blind, 0.0)
        return (out @ value, out) if context.need_weights else (out, None)


class IdentityMechanism(nn.Module):
    """Returns the values: a model without attention."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """The values, and the identity matrix when weights are wanted."""
        if context.cache is not None:
            entry = context.cache.layers[layer]
            assert isinstance(entry, FavorCacheLayer)
            entry.length += query.shape[-2]
        if not context.need_weights:
            return value, None
        eye = torch.eye(query.shape[-2], dtype=value.dtype, device=value.device)
        return value, eye.expand(*query.shape[:2], -1, -1)


def build_mechanism(
    config: PerformerConfig, layer: int | None = None, generator: torch.Generator | None = None
) -> nn.Module:
    """The mechanism of one layer."""
    attention = config.attention if layer is None else config.layer_attention(layer)
    entry = ATTENTIONS[attention]
    entry.check_causal(config.is_decoder)
    if attention == config.attention:
        # An attention that was set after the configuration was made brings options of its own.
        config.attention_options = entry.complete_options(config.attention_options)
    return entry.build(config, generator)


def _softmax(config: PerformerConfig, generator: torch.Generator | None) -> nn.Module:
    # The configuration refuses None.
    projection: Any = config.projection

    def build(heads: int, window: int | None) -> FavorMechanism:
        features = SoftmaxFeatures(
            config.head_dim,
            config.num_features,
            estimator=config.estimator,
            projection=projection,
            regularized=config.regularized,
            num_heads=heads if config.features_per_head else None,
            generator=generator,
        )
        return FavorMechanism(features, window=window, sinks=config.sinks)

    heads = config.num_attention_heads
    if config.position_window is None:
        return build(heads, config.window)
    near = build(heads // 2, config.window)
    return PositionWindowMechanism(near, build(heads - heads // 2, config.position_window))


def _generalized(
    fn: str, config: PerformerConfig, generator: torch.Generator | None
) -> FavorMechanism:
    features = GeneralizedFeatures(
        config.head_dim,
        config.num_features,
        fn=fn,
        epsilon=config.kernel_epsilon,
        projection=config.projection,
        num_heads=config.projected_heads,
        generator=generator,
    )
    return FavorMechanism(features)


register_attention("favor-softmax", _softmax, cache=FavorCacheLayer)
for _name in FUNCTIONS:
    register_attention(f"favor-{_name}", partial(_generalized, _name), cache=FavorCacheLayer)
register_attention(
    "exact",
    lambda config, generator: ExactMechanism(),
    options=ExactOptions,
    cache=DynamicLayer,
)
register_attention("identity", lambda config, generator: IdentityMechanism(), cache=FavorCacheLayer)


class ResidualLinear(nn.Linear):
    """Last layer of a residual branch, with smaller initial weights: the sum stays bounded."""


class PerformerSelfAttention(nn.Module):
    """Projections, positions, mechanism, output projection.

    ``query_key_value`` has two parts, and not three, where queries serve as keys.
    """

    def __init__(self, config: PerformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.parts = 2 if ATTENTIONS[config.layer_attention(layer)].shares_query else 3
        self.query_key_value = nn.Linear(config.hidden_size, self.parts * config.hidden_size)
        self.mechanism = build_mechanism(config, layer)
        self.output = ResidualLinear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor | None]:
        """From ``(B, L, hidden_size)`` to the same shape, and the attention matrix or None."""
        projected = self.query_key_value(hidden_states)
        parts = projected.unflatten(-1, (self.parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, *between, value = parts.unbind(0)
        if context.rotary is not None:
            query = rotate(query, context.rotary)
        key = query
        if between:
            key = between[0] if context.rotary is None else rotate(between[0], context.rotary)
        out, weights = self.mechanism(query, key, value, context, self.layer)
        return self.output(out.transpose(1, 2).flatten(2).to(hidden_states.dtype)), weights
