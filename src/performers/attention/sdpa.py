"""``scaled_dot_product_attention`` by random features, and its arguments in linear terms."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from performers.attention.exact_keys.listed_keys import ListedKeys
from performers.attention.functional import favor_attention
from performers.attention.sharding import current_sharding
from performers.features import FeatureMap, SoftmaxFeatures

_OTHER_MASK = (
    "attn_mask must be bool and mean padding (the same for every query and head), causal attention "
    "(the lower triangle) or both: linear attention never forms the matrix that another mask would "
    "act on; pass padding as (batch, 1, 1, keys), causal attention as is_causal=True, or leave "
    "this attention exact"
)
_PASS_INSTEAD = (
    "pass padding as (batch, 1, 1, keys) or key_mask, causal attention as is_causal=True"
)
# An unusual seed: with a common one (0, 42) the projection would equal the user's own randn.
_SEED = 1_406_947_942
_FEATURES: dict[str, SoftmaxFeatures] = {}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    feature_map: FeatureMap | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    listed_keys: ListedKeys | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear attention with the arguments of ``torch.nn.functional.scaled_dot_product_attention``.

    The first eight arguments and the result are torch's. Queries and keys may have any leading
    axes; without a head axis (three dimensions) the first is the batch. With ``is_causal`` query
    ``i`` sees keys ``0..i``, for any numbers of queries and keys, as in torch. Keys and values must
    have the same number of heads: one key head is not broadcast to several value heads, as torch
    does, nor the reverse.

    A bool ``attn_mask`` of shape ``(..., 1, S)`` is padding. One that has a row for each query is
    read: it may mean padding, causal attention, or both, and a query that sees nothing gives
    zeros. Reading takes time proportional to the mask, and makes a GPU wait; under
    ``torch.compile`` and inside ``performers.distributed.sequence_parallel`` such a mask is
    refused.

    Without ``feature_map`` the features are ``SoftmaxFeatures(head_dim)``, drawn with a fixed
    seed at the first call for a head_dim, device and dtype, and kept for all later ones: results do
    not depend on torch's random numbers. All layers then share one projection, which nothing
    redraws or calibrates: pass each layer a map of its own for that.

    Args:
        query: Shape ``(..., H, L, D)``.
        key: Shape ``(..., H, S, D)``; with ``enable_gqa`` its heads divide those of ``query``.
        value: Shape ``(..., H, S, Dv)``.
        attn_mask: Bool, broadcasts to ``(..., H, L, S)``, True = take part.
        dropout_p: Must be 0: the weights are never formed.
        is_causal: As in torch; excludes ``attn_mask`` and goes with ``key_mask``.
        scale: Factor on ``q . k``, at least 0; ``1 / sqrt(D)`` when None.
        enable_gqa: Allow fewer heads of keys than of queries.
        feature_map: As in ``favor_attention``, or None.
        key_mask: Bool, shape ``(B, S)``, True = the key takes part; for four dimensions or fewer.
        window: As in ``favor_attention``.
        sinks: As in ``favor_attention``.
        listed_keys: As in ``favor_attention``.
        backend: As in ``favor_attention``.

    Returns:
        Shape ``(..., H, L, Dv)``.

    Raises:
        ValueError: ``dropout_p`` is not 0, ``attn_mask`` has no linear form, or an argument does
            not fit.

    Example:
        >>> import torch, performers
        >>> query, key, value = (torch.randn(1, 8, 1000, 64) for _ in range(3))
        >>> padding = torch.arange(1000).view(1, 1, 1, -1) < 700
        >>> performers.scaled_dot_product_attention(query, key, value, attn_mask=padding).shape
        torch.Size([1, 8, 1000, 64])
    """
    if dropout_p:
        raise ValueError(
            f"dropout_p must be 0, got {dropout_p}: the weights it would act on are never formed; "
            "use dropout on the output instead"
        )
    call = read_call(query, key, value, attn_mask, is_causal, enable_gqa, key_mask=key_mask)
    if feature_map is None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        feature_map = _kept_features(query.shape[-1], query.device, dtype)
    out = favor_attention(
        *call.inputs,
        feature_map,
        window=window,
        sinks=sinks,
        listed_keys=listed_keys,
        backend=backend,
        scale=scale,
        **call.masks,
    )
    return call.output(out)


class SdpaCall(NamedTuple):
    """A call of ``scaled_dot_product_attention`` in the terms of ``favor_attention``.

    Attributes:
        inputs: Query, key and value, ``(batch, heads, length, head_dim)``.
        masks: ``is_causal`` and ``key_mask``.
        sees: Queries to which a mask leaves a key, ``(batch, 1, L, 1)``; None: all.
        leading: The axes that the batch stands for.
        added: The axes that were not in the call.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    masks: dict[str, Any]
    sees: Tensor | None
    leading: tuple[int, ...]
    added: tuple[int, ...]

    def output(self, out: Tensor) -> Tensor:
        """Bring the output of ``favor_attention`` to the axes of the call."""
        if self.sees is not None:
            out = out.where(self.sees, 0.0)
        out = out.unflatten(0, self.leading)
        for axis in reversed(self.added):
            out = out.squeeze(axis)
        return out


def read_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    mask_is_causal: bool | None = None,
) -> SdpaCall:
    """Bring a call of ``scaled_dot_product_attention`` to the terms of ``favor_attention``.

    ``mask_is_causal`` tells the meaning of an ``attn_mask`` with a row for each query where its
    values cannot be read, under ``torch.compile``; the compiled call checks it.

    Raises:
        ValueError: ``attn_mask`` has no linear form, or the axes do not fit.
    """
    count = query.ndim
    if not 2 <= count == key.ndim == value.ndim:
        raise ValueError(
            "query, key and value must have the same number of dimensions, at least 2, got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if attn_mask is not None and is_causal:
        raise ValueError(
            "attn_mask must be None with is_causal=True, as in torch; pass padding as key_mask"
        )
    # Three dimensions are a batch; with grouped heads they can only be heads.
    added = {2: (0, 1), 3: (0,) if enable_gqa else (1,)}.get(count, ())
    mask = attn_mask
    for axis in added:
        query, key, value = (x.unsqueeze(axis) for x in (query, key, value))
        # Missing axes of a mask stand in front.
        if mask is not None and mask.ndim > 2:
            mask = mask.unsqueeze(axis)
    leading = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    heads, length, size = query.shape[-3], query.shape[-2], key.shape[-2]
    if not enable_gqa and key.shape[-3] not in (1, heads):
        raise ValueError(
            f"key has {key.shape[-3]} heads and query has {heads}: pass enable_gqa=True to share "
            "key heads among query heads"
        )
    query, key, value = (
        x.expand(*leading, *x.shape[-3:]).flatten(0, -4) for x in (query, key, value)
    )
    sees = None
    if mask is not None:
        mask = _laid_out(mask, leading, (heads, length, size))
        is_causal, keys, sees = _read_mask(mask, mask_is_causal)
        key_mask = keys if key_mask is None else keys & key_mask
    # In a shard of a row, causal keys and queries that differ in number are refused, not aligned.
    is_aligned = is_causal and current_sharding() is None
    if is_aligned and length < size:
        # Nobody sees the keys after the last query.
        key, value = key[:, :, :length], value[:, :, :length]
        key_mask = None if key_mask is None else key_mask[:, :length]
    elif is_aligned and length > size:
        if key_mask is None:
            key_mask = torch.ones(len(key), size, dtype=torch.bool, device=key.device)
        key_mask = F.pad(key_mask, (0, length - size))
        key, value = (F.pad(x, (0, 0, 0, length - size)) for x in (key, value))
    masks = {"is_causal": is_causal, "key_mask": key_mask}
    return SdpaCall((query, key, value), masks, sees, tuple(leading), added)


def _laid_out(mask: Tensor, leading: torch.Size, rest: tuple[int, int, int]) -> Tensor:
    """A mask of shape ``(batch, 1 or heads, 1 or L, S)``."""
    if mask.dtype != torch.bool:
        raise ValueError(
            f"attn_mask must be bool (True = take part), got {mask.dtype}: linear attention adds "
            "nothing to scores that it never forms; pass attn_mask == 0 for a mask of 0 and -inf, "
            "or leave attention with a bias exact"
        )
    shape = (*leading, *rest)
    mask = mask[(None,) * max(0, len(shape) - mask.ndim)]
    if mask.ndim > len(shape) or any(
        axis not in (1, full) for axis, full in zip(mask.shape, shape, strict=True)
    ):
        raise ValueError(f"attn_mask must broadcast to {shape}, got {tuple(mask.shape)}")
    for axis in (-3, -2):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask.expand(*leading, *mask.shape[-3:-1], rest[-1]).flatten(0, -4)


def _read_mask(mask: Tensor, mask_is_causal: bool | None) -> tuple[bool, Tensor, Tensor | None]:
    """Read ``is_causal``, ``key_mask`` and the queries that see a key from a mask."""
    if mask.shape[1] == mask.shape[2] == 1:
        return False, mask[:, 0, 0], None
    if current_sharding() is not None:
        raise ValueError(
            "attn_mask with a row for each query, or for each head, cannot be read from the shard "
            f"of a process inside performers.distributed.sequence_parallel: {_PASS_INSTEAD}"
        )
    rows = mask[:, 0]
    same, key_mask, sees = (mask == mask[:, :1]).all(), rows.any(1), rows.any(2, keepdim=True)

    def means(is_causal: bool) -> Tensor:
        expected = key_mask[:, None].expand_as(rows)
        expected = expected.tril() if is_causal else expected
        return same & ((rows == expected) | ~sees).all()

    if torch.compiler.is_compiling():
        if mask_is_causal is None:
            raise ValueError(
                "attn_mask with a row for each query cannot be read under torch.compile: "
                f"{_PASS_INSTEAD}"
            )
        torch._assert_async(means(mask_is_causal), _OTHER_MASK)
        is_causal = mask_is_causal
    else:
        is_causal = not means(False)
        if is_causal and not means(True):
            raise ValueError(f"{_OTHER_MASK}; got shape {tuple(mask.shape)}")
    return is_causal, key_mask, sees.unsqueeze(1)


def _kept_features(head_dim: int, device: torch.device, dtype: torch.dtype) -> SoftmaxFeatures:
    place = f"{head_dim} {device} {dtype}"
    _make_features(place, head_dim, device, dtype)
    return _FEATURES[place]


def _make_features(place: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    def make() -> None:
        features = SoftmaxFeatures(head_dim, generator=torch.Generator().manual_seed(_SEED))
        _FEATURES[place] = features.to(device, dtype)

    if place not in _FEATURES:
        # A thread has none of the modes of this call, which later calls must not depend on: fake
        # tensors of torch.export, levels of torch.func, inference mode, a default device.
        with ThreadPoolExecutor(1) as executor:
            executor.submit(make).result()


# torch.compiler.assume_constant_result, without the import of the compiler: it runs the function
# and need not trace how a projection is drawn.
vars(_make_features)["_dynamo_marked_constant"] = True
