"""Multi-head attention in linear time, with the arguments and call of torch's own module."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.features import FeatureMap, SoftmaxFeatures
from performers.nn.favor import FavorAttention


class HeadInputs(NamedTuple):
    """Inputs of one call, split into heads.

    Attributes:
        query: Shape ``(N, heads, L, head_dim)``.
        key: Shape ``(N, heads, S, head_dim)``, with those of ``add_bias_kv`` and ``add_zero_attn``
            last where attention is not causal.
        value: Likewise.
        is_causal: A query sees itself and what precedes it.
        key_mask: Shape ``(N, S)``, True where a key takes part, or None.
        past: Keys and values of ``add_bias_kv`` and ``add_zero_attn`` in causal attention, where
            they precede the sequence, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    key_mask: Tensor | None
    past: tuple[Tensor, Tensor] | None


class PerformerAttention(FavorAttention, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with random-feature attention inside.

    ``out = concat_h(favor_attention(q W_q, k W_k, v W_v)) W_o``. Parameters have the names and
    shapes of ``nn.MultiheadAttention``, so its ``state_dict`` loads with ``strict=False`` (only
    the feature map's projection is missing). Source: Choromanski et al. 2021 (arXiv 2009.14794).

    It differs from ``nn.MultiheadAttention`` where linear time demands it: ``need_weights`` is
    False unless asked for, an ``attn_mask`` other than a causal one is refused, and so is
    ``dropout`` on the attention matrix, which is never formed. It is a subclass, because callers
    ask for the type; everything but the type is its own. ``nn.TransformerEncoder`` copies the
    layer it is given, random features included: ``redraw_features_(encoder)`` gives each its own.

    Args:
        embed_dim: Width of the model.
        num_heads: Heads; divides ``embed_dim``.
        dropout: Must be 0.
        bias: Biases in the input and output projections.
        add_bias_kv: Append one learned key and value that every query sees.
        add_zero_attn: Append a key and value of zeros that every query sees.
        kdim: Width of the keys; ``embed_dim`` when None.
        vdim: Width of the values; ``embed_dim`` when None.
        batch_first: Inputs are ``(batch, length, width)`` instead of ``(length, batch, width)``.
        device: Of the parameters.
        dtype: Of the parameters.
        feature_map: A feature map for ``head_dim = embed_dim / num_heads``; by default
            ``SoftmaxFeatures(head_dim)``.
        window: As in ``favor_attention``: attend exactly within this reach (self-attention).
        sinks: As in ``favor_attention``: attend exactly to the first keys.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> attention = PerformerAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 100, 64)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 100, 64])
    """

    # What nn.TransformerEncoderLayer asks before it takes torch's fused path, which would compute
    # exact attention without a word.
    _qkv_same_embed_dim = False
    # Of wider types than those of the base class.
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
        # Not that of nn.MultiheadAttention, whose parameters would be made for nothing.
        super().__init__(
            feature_map if device is None else feature_map.to(device), window=window, sinks=sinks
        )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.dropout = 0.0
        self.add_zero_attn = add_zero_attn

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

    def _reset_parameters(self) -> None:
        """``reset_parameters``, under the name that callers of ``nn.MultiheadAttention`` use."""
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # That of the base class would allow torch's fused path.
        nn.Module.__setstate__(self, state)

    def _initialise_projections(self) -> None:
        for weight in self._projection_weights(whole=True):
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
        """Attend.

        Args:
            query: Shape ``(L, N, embed_dim)``, ``(N, L, embed_dim)`` with ``batch_first``, or
                ``(L, embed_dim)``.
            key: Likewise with ``S`` and ``kdim``.
            value: Likewise with ``S`` and ``vdim``.
            key_padding_mask: Shape ``(N, S)`` or ``(S,)``; True (or minus infinity) = ignore.
            need_weights: Also return the attention matrix implied by the features (quadratic).
            attn_mask: None, a mask that hides nothing, or the causal mask.
            average_attn_weights: Average the returned matrix over heads.
            is_causal: Attention is causal; ``attn_mask``, if given, is then not looked at.

        Returns:
            The output, shaped like ``query``, and the matrix ``(N, L, S)`` (``(N, heads, L, S)``
            without averaging), or None. Columns of ``add_bias_kv`` and ``add_zero_attn`` come
            last in the matrix.

        Raises:
            ValueError: A shape does not fit, or a mask has no linear form.
        """
        heads = self.head_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        state = None
        if heads.past is not None:
            _, state = super().forward(
                torch.zeros_like(heads.past[0]), *heads.past, is_causal=True, return_state=True
            )
        options: dict[str, Any] = {"is_causal": heads.is_causal, "key_mask": heads.key_mask}
        out, _ = super().forward(heads.query, heads.key, heads.value, state=state, **options)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            if heads.past is not None:
                raise ValueError(
                    "need_weights is not available for causal attention with add_bias_kv or "
                    "add_zero_attn; pass need_weights=False"
                )
            weights = self.weights(heads.query, heads.key, **options)
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
        """Arguments of `forward`, checked, projected and split into heads."""
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
        return HeadInputs(query, key, value, is_causal, mask, extra)

    def _projection_weights(self, *, whole: bool = False) -> tuple[Tensor, ...]:
        if not self._same_widths:
            return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return (self.in_proj_weight,) if whole else self.in_proj_weight.chunk(3)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self._same_widths and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            projected = tuple(
                F.linear(x, weight, bias)
                for x, weight, bias in zip(
                    (query, key, value), self._projection_weights(), biases, strict=True
                )
            )
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]

    def _extra(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of ``add_bias_kv`` and ``add_zero_attn``, ``(N, heads, n, head_dim)``."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if self.bias_k is not None and self.bias_v is not None:
            for extra, parts in ((self.bias_k, keys), (self.bias_v, values)):
                heads = extra.view(1, self.num_heads, 1, self.head_dim).to(key.dtype)
                parts.append(heads.expand(key.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            keys.append(torch.zeros_like(key[:, :, :1]))
            values.append(torch.zeros_like(value[:, :, :1]))
        return (torch.cat(keys, dim=2), torch.cat(values, dim=2)) if keys else None


def _is_causal_mask(mask: Tensor | None, length: int, size: int) -> bool:
    """Whether a mask in torch's conventions is the causal one; False if it hides nothing."""
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
