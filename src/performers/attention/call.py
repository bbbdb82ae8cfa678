"""One attention call: every argument declared once, checked, and brought to one layout."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from performers.attention.exact_keys.listed_keys import KeyLists, ListedKeys, check_listed_keys
from performers.attention.exact_keys.neighbours import (
    NeighbourLists,
    Neighbours,
    find_neighbours,
)
from performers.attention.exact_keys.window_and_sinks import (
    SinkKeys,
    check_window_and_sinks,
    find_sinks_,
    join_recent_,
)
from performers.attention.state import FavorState
from performers.features import FeatureForm, FeatureMap
from performers.features.base import check_key_mask, form_of_heads, resolve_scale
from performers.features.precision import autocast_dtype, without_autocast
from performers.features.recomputation import VersionedModule, guard_recomputation


class PairOptions(TypedDict, total=False):
    """Options of ``favor_attention_weights``."""

    is_causal: bool
    key_mask: Tensor | None
    scale: float | None
    window: int | None
    sinks: int
    listed_keys: ListedKeys | None
    neighbours: Neighbours | None
    neighbour_bias: Tensor | None
    positions: Tensor | None


class AttentionOptions(PairOptions, total=False):
    """Options of ``favor_attention`` that do not change the type of its result."""

    cu_seqlens: Tensor | None
    state: FavorState | None
    backend: str | None


@dataclass(eq=False)
class AttentionCall:
    """The arguments of ``favor_attention``, and what ``checked`` makes of them for backends.

    In a checked call, query ``i`` stands at the position of key ``i + offset``. It meets exactly,
    that is with ``exp(factor q . k)``, the sinks it sees, the keys ``j`` of its own sequence with
    ``|i + offset - j| <= window``, and those in its list; all others it meets through features.
    With ``positions`` the window is of these in place of ``i + offset`` and ``j``.

    The fields are the arguments of ``favor_attention``; these change in ``checked`` or are added by
    it.

    Attributes:
        query: ``(batch, key_heads, groups, L, head_dim)``: the query heads that share a key head
            stand together.
        key: ``(batch, key_heads, S, head_dim)``: the first ``offset`` are those that a state held
            besides its sums, and there is a head for each projection.
        value: ``(batch, key_heads, S, value_dim)``.
        key_mask: Shape ``(batch, S)``, True where a key takes part and is no sink, or None.
        is_part: True for a bidirectional call whose rows are joined with those of other keys.
        form: The record of the feature map; its ``num_heads`` is 1 or ``key_heads``.
        factor: The factor on ``q . k``.
        segments: Shape ``(S,)``, the packed sequence each position belongs to, or None.
        offset: Keys before the position of the first query: ``window`` with a state, else 0.
        sink_keys: The sinks of each sequence, or None.
        lists: The listed keys of each query, by content or along edges, or None. They are among
            the keys of ``key_mask``; pairs within the window do not count twice.
        dtype: The dtype to compute in: float32, or float64 for float64 inputs.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    feature_map: FeatureMap
    is_causal: bool = False
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float | None = None
    window: int | None = None
    sinks: int = 0
    # An argument that not every backend computes names those that do, and says what keeps the
    # others from a call in which it is not its default.
    listed_keys: ListedKeys | None = field(
        default=None,
        metadata={"backends": ("native", "torch", "reference"), "otherwise": "with listed keys"},
    )
    neighbours: Neighbours | None = field(
        default=None,
        metadata={"backends": ("native", "torch", "reference"), "otherwise": "with neighbours"},
    )
    neighbour_bias: Tensor | None = None
    positions: Tensor | None = field(
        default=None,
        metadata={
            "backends": ("native", "torch", "reference"),
            "otherwise": "with a window measured in positions",
        },
    )
    state: FavorState | None = None
    return_state: bool = False
    is_part: bool = field(
        init=False,
        default=False,
        metadata={
            "backends": ("native", "torch"),
            "otherwise": "for a part of a bidirectional row",
        },
    )
    form: FeatureForm = field(init=False)
    factor: float = field(init=False)
    segments: Tensor | None = field(init=False)
    offset: int = field(init=False)
    sink_keys: SinkKeys | None = field(init=False)
    lists: KeyLists | NeighbourLists | None = field(init=False)
    dtype: torch.dtype = field(init=False)

    def replaced(self, **changes: Any) -> "AttentionCall":
        """The same checked call with other values of some attributes."""
        # What the compiler of torch 2.7 knows of copying a dataclass.
        call = object.__new__(type(self))
        for name in _NAMES:
            setattr(call, name, changes[name] if name in changes else getattr(self, name))
        return call

    def sliced(self, start: int, stop: int) -> "AttentionCall":
        """The same checked call for some positions of its queries and keys."""
        return self.replaced(
            query=self.query[..., start:stop, :],
            key=self.key[:, :, start:stop],
            value=self.value[:, :, start:stop],
            key_mask=None if self.key_mask is None else self.key_mask[:, start:stop],
        )

    def valid_keys(self) -> Tensor:
        """Mask ``(batch, S)`` of the keys that take part."""
        if self.key_mask is not None:
            return self.key_mask
        return self.key.new_ones((self.key.shape[0], self.key.shape[2]), dtype=torch.bool)

    def has_exact_pairs(self) -> bool:
        """Return True if some keys are met exactly."""
        return not (self.window is None and self.sink_keys is None and self.lists is None)

    def past(self) -> FavorState:
        """The sums before the first key; zeros without a state."""
        if self.state is not None:
            return self.state
        shape = (*self.key.shape[:2], self.form.num_features)
        zeros = self.value.new_zeros(shape, dtype=self.dtype)
        return FavorState(
            self.value.new_zeros((*shape, self.value.shape[-1]), dtype=self.dtype),
            zeros,
            zeros if self.form.kind == "elementwise" else torch.full_like(zeros, -math.inf),
        )

    def checked(self) -> "AttentionCall":
        """Check the arguments, bring them to the layout of backends, and return the call itself.

        Raises:
            ValueError: An argument does not fit.
        """
        self._check_tensors()
        form = form_of_heads(self.feature_map, self.query, self.key)
        query, key, value = self.query, self.key, self.value
        heads = query.shape[1]
        if form.num_heads() == heads != key.shape[1]:
            # Every query head has features of its own, so no key features are shared.
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        check_window_and_sinks(self, form)
        modules: list[VersionedModule] = [self.feature_map]
        if self.listed_keys is not None:
            check_listed_keys(self.listed_keys, self, form, key.shape[1])
            modules.append(self.listed_keys)
        query, key, value = guard_recomputation((query, key, value), *modules)
        query = query.unflatten(1, (key.shape[1], heads // key.shape[1]))
        dtype = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.query, self.key, self.value, self.form = query, key, value, form
        self.segments = self._segments()
        self.factor = resolve_scale(self.scale, query.shape[-1])
        self.offset, self.sink_keys, self.lists = 0, None, None
        if self.state is not None:
            self.state = self._checked_state(self.state)
        if self.key_mask is not None:
            check_key_mask(self.key_mask, key)
            self.key_mask = self.key_mask.to(query.device)
        if form.query_transform is not None:
            self._balance()
        if self.sinks:
            find_sinks_(self)
        if self.listed_keys is not None:
            # Lists are made from queries and keys as they are given, not as a map balances them.
            self.lists = self.listed_keys(query, key, self.key_mask, is_causal=self.is_causal)
        if self.neighbours is not None:
            self.lists = find_neighbours(self, form)
        elif self.neighbour_bias is not None:
            raise ValueError("neighbour_bias needs neighbours, the edges that it is for")
        if self.window and self.state is not None:
            join_recent_(self)
        return self

    def _check_tensors(self) -> None:
        query, key, value = self.query, self.key, self.value
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
                f"the number of query heads ({heads}) must be a multiple of the number of key "
                f"heads ({key_heads})"
            )
        if autocast_dtype(query.device) is None and not (query.dtype == key.dtype == value.dtype):
            raise ValueError(
                "query, key and value must have one dtype (outside autocast), got "
                f"{query.dtype}, {key.dtype} and {value.dtype}"
            )
        if self.is_causal and length != size:
            raise ValueError(
                f"is_causal needs as many keys as queries, got {size} and {length}; pass the past "
                "through state"
            )
        if self.state is not None or self.return_state:
            if not self.is_causal:
                raise ValueError("state and return_state need is_causal=True")
            if self.cu_seqlens is not None:
                name = "return_state" if self.state is None else "state"
                raise ValueError(f"{name} cannot be combined with cu_seqlens: a state has one past")

    def _checked_state(self, state: FavorState) -> FavorState:
        """The past, with sums in ``dtype``."""
        key, width = self.key, self.value.shape[-1]
        rows = (*key.shape[:2], self.form.num_features)
        expected: list[tuple[str, tuple[int, ...], str]] = [
            ("key_value", (*rows, width), "batch, heads, num_features, Dv"),
            ("key_sum", rows, "batch, heads, num_features"),
            ("log_scale", rows, "batch, heads, num_features"),
        ]
        for name, kind, now in (
            ("window", "recent", self.window),
            ("sinks", "sink", self.sinks or None),
        ):
            mask = getattr(state, f"{kind}_mask")
            before = None if mask is None else mask.shape[-1]
            if before != now:
                raise ValueError(
                    f"state was made with {name}={before}, but the call has {name}={now}: continue "
                    f"with the {name} that the sequence began with"
                )
            if now is not None:
                rows = (*key.shape[:2], now)
                expected += [
                    (f"{kind}_key", (*rows, key.shape[-1]), f"batch, heads, {name}, D"),
                    (f"{kind}_value", (*rows, width), f"batch, heads, {name}, Dv"),
                    (f"{kind}_mask", (key.shape[0], now), f"batch, {name}"),
                ]
        for name, shape, layout in expected:
            tensor = getattr(state, name)
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
        none = (None, None, None)
        return FavorState(
            *(x.to(self.dtype) for x in state.sums()),
            *(state.exact_keys("recent") or none),
            *(state.exact_keys("sink") or none),
        )

    def _segments(self) -> Tensor | None:
        """The index of the packed sequence that each position belongs to."""
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is None:
            return None
        batch, length, size = self.query.shape[0], self.query.shape[-2], self.key.shape[2]
        if batch != 1 or length != size:
            raise ValueError(
                "cu_seqlens needs batch size 1 and as many keys as queries, got batch size "
                f"{batch}, {length} queries and {size} keys"
            )
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "cu_seqlens must be a one-dimensional int32 tensor (N + 1,), got "
                f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        # Reading the numbers would make a GPU wait.
        if not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
            ends = cu_seqlens.tolist()
            if not ends or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
                shown = str(ends) if len(ends) <= 8 else f"{ends[:4]} ... {ends[-2:]}"
                raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {shown}")
        device = self.query.device
        stops = cu_seqlens[1:].to(device=device, dtype=torch.int64)
        return torch.bucketize(torch.arange(length, device=device), stops, right=True)

    def _balance(self) -> None:
        """Transform queries and keys as the feature map asks."""
        query, form = self.query.to(self.dtype), self.form.to(self.dtype)
        with without_autocast(query.device):
            balanced = form.transformed(query.flatten(2, 3), is_query=True)
            self.query = balanced.unflatten(2, query.shape[2:4])
            self.key = form.transformed(self.key.to(self.dtype), is_query=False)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros in place of keys or values that take no part, whatever they hold."""
    return x if mask is None else x.where(mask[:, None, :, None], 0.0)


_NAMES = tuple(attribute.name for attribute in fields(AttentionCall))
