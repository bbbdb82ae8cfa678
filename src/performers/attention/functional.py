"""The public door: arguments are checked here, once, and nowhere below."""

from typing import Literal, overload

import torch
from torch import Tensor

from performers.attention.backends import resolve_backend
from performers.attention.problem import AttentionProblem
from performers.attention.reference import attention_matrix
from performers.attention.state import FavorState
from performers.features import FeatureForm, FeatureMap
from performers.features.base import resolve_scale
from performers.features.precision import autocast_dtype, without_autocast


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    is_causal: bool = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    state: FavorState | None = ...,
    return_state: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    is_causal: bool = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    sinks: int = ...,
    state: FavorState | None = ...,
    return_state: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, FavorState]: ...


def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    state: FavorState | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, FavorState]:
    """Attention through random features, in time and memory linear in the sequence length.

    ``out_i = sum_j K(q_i, k_j) v_j / sum_j K(q_i, k_j)`` with ``K(q, k) = phi(q) . phi(k)``, where
    ``phi`` is ``feature_map`` applied to ``sqrt(scale) q`` and ``sqrt(scale) k``. With softmax
    features ``K`` is an unbiased estimate of ``exp(scale * q . k)``. Source: Choromanski et al.
    2021 (arXiv 2009.14794), equations 3 to 5 and section 2.5.

    Layout, scale and the rule for grouped heads are those of
    ``torch.nn.functional.scaled_dot_product_attention``. Sums are kept in float32 at least,
    whatever the input's dtype; float64 is computed in float64.

    Args:
        query: Shape ``(B, H, L, D)``.
        key: Shape ``(B, Hkv, S, D)``; ``Hkv`` divides ``H`` and each key head serves ``H / Hkv``
            consecutive query heads.
        value: Shape ``(B, Hkv, S, Dv)``.
        feature_map: ``SoftmaxFeatures`` or ``GeneralizedFeatures`` with ``head_dim == D``. With a
            projection per head, its ``num_heads`` is ``H`` or ``Hkv``.
        is_causal: Query ``i`` sees keys ``0..i`` only, exactly. Needs ``L == S``; a state supplies
            the past.
        key_mask: Bool, shape ``(B, S)``, True = the key takes part. What a masked key or value
            holds does not matter. A query with nothing to attend to gives zeros.
        cu_seqlens: Int32 or int64, shape ``(N + 1,)``, first 0 and last ``L``: N sequences packed
            on the length axis with ``B == 1`` and ``L == S``, each attending to itself only.
        scale: Factor on ``q . k``; ``1 / sqrt(D)`` when None.
        window: Not available yet; must be None.
        sinks: Not available yet; must be 0.
        state: Past of a causal call, as returned by an earlier one.
        return_state: Also return the state after the last key (causal only).
        backend: One of ``performers.backends()``; None chooses.

    Returns:
        Output of shape ``(B, H, L, Dv)`` in the input's dtype (under autocast, in autocast's), or
        a pair of it and the ``FavorState``.

    Raises:
        ValueError: An argument does not fit; the message names it and says what was expected.
        NotImplementedError: ``window`` or ``sinks`` was asked for.

    Example:
        >>> import torch, performers
        >>> q, k, v = (torch.randn(1, 8, 1000, 64) for _ in range(3))
        >>> features = performers.SoftmaxFeatures(64, 256)
        >>> performers.favor_attention(q, k, v, features, is_causal=True).shape
        torch.Size([1, 8, 1000, 64])
    """
    _refuse_exact_terms(window, sinks)
    problem = _checked(
        query, key, value, feature_map, is_causal, key_mask, cu_seqlens, scale, state, return_state
    )
    out, new_state = resolve_backend(backend)(problem)
    out = out.flatten(1, 2).to(_output_dtype(query, key, value))
    if not return_state:
        return out
    assert new_state is not None
    return out, new_state


def favor_attention_weights(
    query: Tensor,
    key: Tensor,
    feature_map: FeatureMap,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> Tensor:
    """The attention matrix that ``favor_attention`` implies; for analysis, quadratic on purpose.

    Args:
        query: Shape ``(B, H, L, D)``.
        key: Shape ``(B, Hkv, S, D)``.
        feature_map: As in ``favor_attention``.
        is_causal: As in ``favor_attention``.
        key_mask: As in ``favor_attention``.
        scale: As in ``favor_attention``.
        window: Not available yet; must be None.
        sinks: Not available yet; must be 0.

    Returns:
        Shape ``(B, H, L, S)``. Rows sum to one; the row of a query with nothing to attend to is
        zero.

    Raises:
        ValueError: An argument does not fit.
        NotImplementedError: ``window`` or ``sinks`` was asked for.
    """
    _refuse_exact_terms(window, sinks)
    problem = _checked(query, key, key, feature_map, is_causal, key_mask, None, scale, None, False)
    with without_autocast(query.device):
        weights = attention_matrix(problem)
    return weights.flatten(1, 2).to(_output_dtype(query, key))


def _refuse_exact_terms(window: int | None, sinks: int) -> None:
    if window is not None or sinks:
        raise NotImplementedError(
            "exact terms (window, sinks) are not available in this version; pass window=None and "
            f"sinks=0, got window={window} and sinks={sinks}"
        )


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    is_causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    state: FavorState | None,
    return_state: bool,
) -> AttentionProblem:
    """Check everything a backend relies on and bring the tensors to the backends' layout."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), "
                f"got shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}")
    batch, heads, length, head_dim = query.shape
    key_heads, size = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key must have shape ({batch}, Hkv, S, {head_dim}) to go with query "
            f"{tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have shape ({batch}, {key_heads}, {size}, Dv) to go with key "
            f"{tuple(key.shape)}, got {tuple(value.shape)}"
        )
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"the number of query heads ({heads}) must be a multiple of the number of key heads "
            f"({key_heads})"
        )
    if autocast_dtype(query.device) is None and not (query.dtype == key.dtype == value.dtype):
        raise ValueError(
            "query, key and value must have one dtype (outside autocast), got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if is_causal and length != size:
        raise ValueError(
            f"is_causal needs as many keys as queries, got {size} and {length}; pass the past "
            "through state"
        )
    if (state is not None or return_state) and not is_causal:
        raise ValueError("state and return_state need is_causal=True")
    form, key, value = _checked_form(feature_map, query, key, value)
    key_heads = key.shape[1]
    dtype = torch.promote_types(
        torch.promote_types(query.dtype, key.dtype), torch.promote_types(value.dtype, torch.float32)
    )
    if state is not None:
        if cu_seqlens is not None:
            raise ValueError("state cannot be combined with cu_seqlens: a state has one past")
        state = _checked_state(state, key, value, form.num_features, dtype)
    if return_state and cu_seqlens is not None:
        raise ValueError("return_state cannot be combined with cu_seqlens: a state has one past")
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != (batch, size):
            raise ValueError(
                f"key_mask must be a bool tensor of shape ({batch}, {size}), True = takes part, "
                f"got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        key_mask = key_mask.to(query.device)
    return AttentionProblem(
        query=query.unflatten(1, (key_heads, heads // key_heads)),
        key=key,
        value=value,
        form=form,
        scale=resolve_scale(scale, head_dim),
        is_causal=is_causal,
        key_mask=key_mask,
        segments=_segments(cu_seqlens, batch, length, size, query.device),
        state=state,
        return_state=return_state,
        dtype=dtype,
    )


def _checked_form(
    feature_map: FeatureMap, query: Tensor, key: Tensor, value: Tensor
) -> tuple[FeatureForm, Tensor, Tensor]:
    """The form of the feature map, and keys and values with one head for each of its heads."""
    heads, head_dim = query.shape[1], query.shape[3]
    key_heads = key.shape[1]
    if not isinstance(feature_map, FeatureMap):
        raise ValueError(
            "feature_map must be a FeatureMap such as SoftmaxFeatures, "
            f"got {type(feature_map).__name__}"
        )
    if feature_map.head_dim != head_dim:
        raise ValueError(
            f"feature_map has head_dim={feature_map.head_dim} but query has head_dim={head_dim}"
        )
    form = feature_map.form()
    if form.weight is not None and form.weight.device != query.device:
        raise ValueError(
            f"feature_map is on {form.weight.device} but query is on {query.device}; move it with "
            "feature_map.to(query.device)"
        )
    if feature_map.num_heads not in (None, key_heads, heads):
        raise ValueError(
            f"feature_map has num_heads={feature_map.num_heads}; with {heads} query heads and "
            f"{key_heads} key heads it must be one of these or None"
        )
    if form.num_heads() == heads != key_heads:
        # Every query head has features of its own, so no key features are shared.
        key = key.repeat_interleave(heads // key_heads, dim=1)
        value = value.repeat_interleave(heads // key_heads, dim=1)
    return form, key, value


def _checked_state(
    state: FavorState, key: Tensor, value: Tensor, num_features: int, dtype: torch.dtype
) -> FavorState:
    sums = (*key.shape[:2], num_features)
    for name, tensor, expected, layout in (
        ("key_value", state.key_value, (*sums, value.shape[-1]), "batch, heads, num_features, Dv"),
        ("key_sum", state.key_sum, sums, "batch, heads, num_features"),
        ("log_scale", state.log_scale, sums, "batch, heads, num_features"),
    ):
        if tensor.shape != expected:
            raise ValueError(
                f"state must have {name} of shape {expected} ({layout}), got {tuple(tensor.shape)}"
            )
        if tensor.device != key.device:
            raise ValueError(
                f"state is on {tensor.device} but query is on {key.device}; move it with "
                "state.to(query.device)"
            )
    return FavorState(*(x.to(dtype) for x in (state.key_value, state.key_sum, state.log_scale)))


def _segments(
    cu_seqlens: Tensor | None, batch: int, length: int, size: int, device: torch.device
) -> Tensor | None:
    """The index of the packed sequence that each position belongs to."""
    if cu_seqlens is None:
        return None
    if batch != 1 or length != size:
        raise ValueError(
            f"cu_seqlens needs batch size 1 and as many keys as queries, got batch size {batch}, "
            f"{length} queries and {size} keys"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be a one-dimensional int32 tensor (N + 1,), got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if not offsets or offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the length {length}, got {_shortened(offsets)}"
            )
    ends = cu_seqlens[1:].to(device=device, dtype=torch.int64)
    return torch.bucketize(torch.arange(length, device=device), ends, right=True)


def _shortened(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) <= 8 else f"{offsets[:4]} ... {offsets[-2:]}"


def _output_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = autocast_dtype(tensors[0].device)
    return tensors[0].dtype if dtype is None or tensors[0].dtype == torch.float64 else dtype
