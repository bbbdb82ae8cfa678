"""Arguments of an attention call are checked here, once, and brought to the backends' layout."""

import torch
from torch import Tensor

from performers.attention.buckets import KeyBuckets
from performers.attention.exact_terms import find_sinks, join_recent
from performers.attention.problem import AttentionProblem
from performers.attention.state import FavorState
from performers.features import FeatureForm, FeatureMap
from performers.features.base import resolve_scale
from performers.features.draws import Drawn, with_same_draws
from performers.features.precision import autocast_dtype, without_autocast


def checked_problem(
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
    window: int | None,
    sinks: int,
    buckets: KeyBuckets | None,
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
    _check_exact_terms(window, sinks, form, length, size)
    key_heads = key.shape[1]
    drawn: tuple[Drawn, ...] = (feature_map,)
    if buckets is not None:
        packed, continued = cu_seqlens is not None, state is not None or return_state
        _check_buckets(buckets, form, head_dim, key_heads, packed=packed, continued=continued)
        drawn = (feature_map, buckets)
    query, key, value = with_same_draws((query, key, value), *drawn)
    dtype = torch.promote_types(
        torch.promote_types(query.dtype, key.dtype), torch.promote_types(value.dtype, torch.float32)
    )
    if state is not None:
        if cu_seqlens is not None:
            raise ValueError("state cannot be combined with cu_seqlens: a state has one past")
        state = _checked_state(state, key, value, form.num_features, window, sinks, dtype)
    if return_state and cu_seqlens is not None:
        raise ValueError("return_state cannot be combined with cu_seqlens: a state has one past")
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != (batch, size):
            raise ValueError(
                f"key_mask must be a bool tensor of shape ({batch}, {size}), True = takes part, "
                f"got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        key_mask = key_mask.to(query.device)
    segments = _segments(cu_seqlens, batch, length, size, query.device)
    query = query.unflatten(1, (key_heads, heads // key_heads))
    # Buckets know queries and keys as they are given, not as a feature map balances them.
    given_query, given_key = query, key
    query, key = _transformed(form, query, key, dtype)
    found, offset, lists = None, 0, None
    if sinks:
        found, key_mask = find_sinks(
            sinks,
            key,
            value,
            key_mask,
            segments,
            0 if cu_seqlens is None else len(cu_seqlens) - 1,
            state,
            is_causal=is_causal,
            length=length,
        )
    if buckets is not None:
        lists = buckets(given_query, given_key, key_mask, is_causal=is_causal)
    if window and state is not None:
        key, value, key_mask = join_recent(state, key, value, key_mask)
        offset = window
    return AttentionProblem(
        query=query,
        key=key,
        value=value,
        form=form,
        scale=resolve_scale(scale, head_dim),
        is_causal=is_causal,
        key_mask=key_mask,
        segments=segments,
        state=state,
        return_state=return_state,
        window=window,
        offset=offset,
        sinks=found,
        dtype=dtype,
        lists=lists,
    )


def _transformed(
    form: FeatureForm, query: Tensor, key: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Queries ``(B, Hkv, G, L, D)`` and keys, balanced where the feature map asks for it."""
    if form.query_transform is None:
        return query, key
    form = form.to(dtype)
    with without_autocast(query.device):
        balanced = form.transformed(query.to(dtype).flatten(2, 3), is_query=True)
        return balanced.unflatten(2, query.shape[2:4]), form.transformed(
            key.to(dtype), is_query=False
        )


def _check_exact_terms(
    window: int | None, sinks: int, form: FeatureForm, length: int, size: int
) -> None:
    for name, value in (("window", window), ("sinks", sinks)):
        optional = name == "window"
        if not (optional and value is None) and (
            not isinstance(value, int) or isinstance(value, bool) or value < 0
        ):
            kind = "an integer >= 0 or None" if optional else "an integer >= 0"
            raise ValueError(f"{name} must be {kind}, got {value!r}")
        if ((name == "sinks" and sinks) or (name == "window" and window is not None)) and (
            not form.estimates_softmax()
        ):
            raise ValueError(
                f"{name} needs a feature map that estimates the softmax kernel (SoftmaxFeatures): "
                f"exact terms exp(q . k) cannot be added to another kernel, got {name}={value}"
            )
    if window is not None and length != size:
        raise ValueError(
            f"window needs as many keys as queries, got {size} keys and {length} queries; for "
            "cross attention pass window=None"
        )


def _check_buckets(
    buckets: KeyBuckets,
    form: FeatureForm,
    head_dim: int,
    key_heads: int,
    *,
    packed: bool,
    continued: bool,
) -> None:
    if not isinstance(buckets, KeyBuckets):
        raise ValueError(f"buckets must be KeyBuckets or None, got {type(buckets).__name__}")
    if form.kind != "exponential" or not form.quadratic:
        raise ValueError(
            "buckets need positive softmax features (SoftmaxFeatures, not trigonometric): other "
            "estimates cannot be exchanged for exp(q . k) key by key"
        )
    if buckets.head_dim != head_dim:
        raise ValueError(
            f"buckets have head_dim={buckets.head_dim} but query has head_dim={head_dim}"
        )
    if buckets.num_heads not in (None, key_heads):
        raise ValueError(
            f"buckets have num_heads={buckets.num_heads}; with {key_heads} key heads (of the "
            "feature map, where it has one per query head) it must be that or None"
        )
    if packed or continued:
        name = "cu_seqlens" if packed else "state and return_state"
        raise ValueError(
            f"buckets cannot be combined with {name}: their lists are made from one whole "
            "sequence; call without buckets, or with the sequences as rows of a padded batch"
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
    form: FeatureForm = feature_map()
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
    state: FavorState,
    key: Tensor,
    value: Tensor,
    num_features: int,
    window: int | None,
    sinks: int,
    dtype: torch.dtype,
) -> FavorState:
    batch, heads = key.shape[:2]
    head_dim, value_dim = key.shape[-1], value.shape[-1]
    for name, tensor, given in (
        ("window", state.recent_mask, window),
        ("sinks", state.sink_mask, sinks or None),
    ):
        held = None if tensor is None else tensor.shape[-1]
        if held != given:
            raise ValueError(
                f"state was made with {name}={held}, but the call has {name}={given}: continue "
                f"with the {name} that the sequence began with"
            )
    sums = (batch, heads, num_features)
    expected: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        ("key_value", state.key_value, (*sums, value_dim), "batch, heads, num_features, Dv"),
        ("key_sum", state.key_sum, sums, "batch, heads, num_features"),
        ("log_scale", state.log_scale, sums, "batch, heads, num_features"),
    ]
    for kind, axis, count in (("recent", "window", window), ("sink", "sinks", sinks or None)):
        if count is not None:
            rows = (batch, heads, count)
            fields: tuple[tuple[str, tuple[int, ...], str], ...] = (
                (f"{kind}_key", (*rows, head_dim), f"batch, heads, {axis}, D"),
                (f"{kind}_value", (*rows, value_dim), f"batch, heads, {axis}, Dv"),
                (f"{kind}_mask", (batch, count), f"batch, {axis}"),
            )
            expected += [
                (name, getattr(state, name), shape, layout) for name, shape, layout in fields
            ]
    for name, tensor, shape, layout in expected:
        if tensor is None or tensor.shape != shape:
            raise ValueError(
                f"state must have {name} of shape {shape} ({layout}), got "
                f"{None if tensor is None else tuple(tensor.shape)}"
            )
        if tensor.device != key.device:
            raise ValueError(
                f"state is on {tensor.device} but query is on {key.device}; move it with "
                "state.to(query.device)"
            )
    return FavorState(
        state.key_value.to(dtype),
        state.key_sum.to(dtype),
        state.log_scale.to(dtype),
        state.recent_key,
        state.recent_value,
        state.recent_mask,
        state.sink_key,
        state.sink_value,
        state.sink_mask,
    )


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
