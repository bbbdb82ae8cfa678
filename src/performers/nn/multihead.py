"""Multi-head attention in linear time, with the arguments and call of ``nn.MultiheadAttention``."""

# torch.compile (2.7) cannot evaluate the annotations of local functions.
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.features import FeatureMap, SoftmaxFeatures
from performers.nn.favor import FavorAttention


class HeadInputs(NamedTuple):
    """Inputs of one call, split into heads: ``(N, heads, length, head_dim)``.

    Keys and values of ``add_bias_kv`` and ``add_zero_attn`` come last in ``key`` and ``value``; in
    causal attention they precede the sequence, as its ``past``. ``options`` are ``is_causal`` and
    ``key_mask`` of ``favor_attention``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    past: tuple[Tensor, Tensor] | None


class PerformerAttention(FavorAttention, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with random-feature attention inside.

    ``out = concat_h(favor_attention(q W_q, k W_k, v W_v)) W_o``. Parameters have the names and
    shapes of ``nn.MultiheadAttention``, so its ``state_dict`` loads with ``strict=False`` (only
    the feature map's projection is missing). Source: Choromanski et al. 2021 (arXiv 2009.14794).

    It differs from ``nn.MultiheadAttention`` where linear time demands it: ``need_weights``
    defaults to False, an ``attn_mask`` other than a causal one is refused, and so is ``dropout`` on
    the attention matrix, which is never formed. It is a subclass so that ``isinstance`` holds, and
    inherits nothing else. ``nn.TransformerEncoder`` copies its layer, random features included:
    ``redraw_features_(encoder)`` draws new ones for each copy.

    Other arguments are those of ``nn.MultiheadAttention``.

    Args:
        dropout: Must be 0.
        feature_map: Feature map for ``head_dim = embed_dim / num_heads``; None:
            ``SoftmaxFeatures(head_dim)``.
        window: As in ``favor_attention``; for self-attention.
        sinks: As in ``favor_attention``.

    Example:
        >>> attention = PerformerAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 100, 64)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 100, 64])
    """

    # nn.TransformerEncoderLayer would otherwise take torch's fused path, which computes exact
    # attention.
    _qkv_same_embed_dim = False
    # Wider types than those of the base class.
    in_proj_bias: Any
    out_proj: Any

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        feature_map: FeatureMap | None = None,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a positive multiple of num_heads, got {embed_dim} and "
                f"{num_heads}"
            )
        if dropout:
            raise ValueError(
                f"dropout must be 0, got {dropout}: the attention matrix it would act on is never "
                "formed; put nn.Dropout on the module's output instead"
            )
        if (window is not None or sinks) and (add_bias_kv or add_zero_attn):
            raise ValueError(
                "window and sinks cannot be combined with add_bias_kv and add_zero_attn, whose "
                f"keys have no position; got window={window} and sinks={sinks}"
            )
        head_dim = embed_dim // num_heads
        if feature_map is None:
            feature_map = SoftmaxFeatures(head_dim)
        if feature_map.head_dim != head_dim:
            raise ValueError(
                f"feature_map must have head_dim={head_dim} (embed_dim / num_heads), "
                f"got {feature_map.head_dim}"
            )
        # FavorAttention's alone: nn.MultiheadAttention's would create parameters that are replaced.
        super().__init__(
            feature_map if device is None else feature_map.to(device), window=window, sinks=sinks
        )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first, self.dropout, self.add_zero_attn = batch_first, 0.0, add_zero_attn

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self._same_widths = self.kdim == self.vdim == embed_dim
        if self._same_widths:
            self.in_proj_weight = parameter(3 * embed_dim, embed_dim)
        else:
            self.q_proj_weight = parameter(embed_dim, embed_dim)
            self.k_proj_weight = parameter(embed_dim, self.kdim)
            self.v_proj_weight = parameter(embed_dim, self.vdim)
        self.in_proj_bias = parameter(3 * embed_dim) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(1, 1, embed_dim) if add_bias_kv else None
        self.bias_v = parameter(1, 1, embed_dim) if add_bias_kv else None
        self._initialise_projections()

    def reset_parameters(self) -> None:
        """Set all parameters and buffers as at construction, features included."""
        # In the order of construction: the same generator gives the same module.
        self.feature_map.reset_parameters()
        self.out_proj.reset_parameters()
        self._initialise_projections()

    # The name in nn.MultiheadAttention.
    _reset_parameters = reset_parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        # That of nn.MultiheadAttention would allow torch's fused path.
        nn.Module.__setstate__(self, state)

    def _initialise_projections(self) -> None:
        # As in nn.MultiheadAttention, where packed weights are one matrix.
        for weight in (self.in_proj_weight,) if self._same_widths else self._projection_weights():
            nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention; arguments and shapes are those of ``nn.MultiheadAttention``.

        ``attn_mask`` is None, a mask that hides nothing, or the causal mask; with ``is_causal`` it
        is ignored. ``need_weights`` also returns the attention matrix that the features imply, at
        quadratic cost; columns of ``add_bias_kv`` and ``add_zero_attn`` come last in it.

        Raises:
            ValueError: A shape does not fit, or a mask has no linear form.
        """
        heads = self.head_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        state = None
        if heads.past is not None:
            _, state = super().forward(
                torch.zeros_like(heads.past[0]), *heads.past, is_causal=True, return_state=True
            )
        out, _ = super().forward(heads.query, heads.key, heads.value, state=state, **heads.options)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            if heads.past is not None:
                raise ValueError(
                    "need_weights is not available for causal attention with add_bias_kv or "
                    "add_zero_attn; pass need_weights=False"
                )
            weights = self.weights(heads.query, heads.key, **heads.options)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if query.ndim == 2:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def head_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> HeadInputs:
        """Check the arguments of `forward`, project them and split them into heads."""
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            raise ValueError(
                "query, key and value must all have 3 dimensions, or 2 without a batch; got "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if query.ndim == 2:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.shape[-1] != width or x.shape[0] != query.shape[0]:
                raise ValueError(
                    f"{name} must have width {width} and the batch size of query "
                    f"({query.shape[0]}), got {tuple(x.shape)} (batch, length, width)"
                )
        length, size = query.shape[1], key.shape[1]
        is_causal = is_causal or _is_causal_mask(attn_mask, length, size)
        mask = _key_mask(key_padding_mask, query.shape[0], size)
        query, key, value = self._project(query, key, value)
        extra = self._extra(key, value)
        if extra is not None and not is_causal:
            key, value = (torch.cat(x, dim=2) for x in zip((key, value), extra, strict=True))
            mask = None if mask is None else F.pad(mask, (0, extra[0].shape[2]), value=True)
            extra = None
        return HeadInputs(query, key, value, {"is_causal": is_causal, "key_mask": mask}, extra)

    def _projection_weights(self) -> tuple[Tensor, ...]:
        if self._same_widths:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self._same_widths and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self._projection_weights()
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]

    def _extra(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of ``add_bias_kv`` and ``add_zero_attn``, ``(N, heads, n, head_dim)``."""

        def parts(bias: Tensor | None, like: Tensor) -> list[Tensor]:
            heads = [] if bias is None else [bias.view(1, self.num_heads, 1, -1).to(like.dtype)]
            heads = [x.expand(len(like), -1, -1, -1) for x in heads]
            return [*heads, torch.zeros_like(like[:, :, :1])] if self.add_zero_attn else heads

        keys, values = parts(self.bias_k, key), parts(self.bias_v, value)
        return (torch.cat(keys, dim=2), torch.cat(values, dim=2)) if keys else None


def _is_causal_mask(mask: Tensor | None, length: int, size: int) -> bool:
    """Tell the causal mask from one that hides nothing; refuse any other."""
    if mask is None:
        return False
    if mask.shape[-2:] != (length, size):
        raise ValueError(f"attn_mask must end in shape ({length}, {size}), got {tuple(mask.shape)}")
    hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    if mask.dtype == torch.bool or bool(((mask == 0) | hidden).all()):
        if not hidden.any():
            return False
        causal = torch.ones(length, size, dtype=torch.bool, device=mask.device).triu(1)
        if length == size and bool((hidden == causal).all()):
            return True
    raise ValueError(
        "attn_mask must be None or the causal mask: linear attention never forms the matrix that "
        "an arbitrary mask would act on; use key_padding_mask for padding, is_causal for causal "
        "attention, or nn.MultiheadAttention"
    )


def _key_mask(padding: Tensor | None, batch: int, size: int) -> Tensor | None:
    if padding is None:
        return None
    if padding.ndim == 1:
        padding = padding.unsqueeze(0)
    if padding.shape != (batch, size):
        raise ValueError(
            f"key_padding_mask must have shape ({batch}, {size}), got {tuple(padding.shape)}"
        )
    if padding.dtype == torch.bool:
        return ~padding
    if padding.is_floating_point() and (
        torch.compiler.is_compiling() or bool(((padding == 0) | (padding == -torch.inf)).all())
    ):
        return padding == 0
    raise ValueError(
        "key_padding_mask must be bool (True = ignore) or float with 0 and -inf only, got "
        f"{padding.dtype}"
    )
