"""The recurrent state of causal attention."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from performers.attention.call import AttentionCall


@dataclass(eq=False)
class FavorState:
    """Everything causal attention remembers of the past, in a size that does not grow.

    With key features ``phi_i(k_j)``, feature ``i`` holds
    ``key_value_i = sum_j phi_i(k_j) v_j e^{-s_i}`` and ``key_sum_i = sum_j phi_i(k_j) e^{-s_i}``,
    where the log scale ``s_i`` is the largest exponent seen so far, so that neither sum can
    overflow or vanish. Float32, or float64 for float64 inputs. With a window, the sums are over
    all keys but the last ``window`` ones, which are kept as they are; sinks are never summed.

    Attributes:
        key_value: Shape ``(batch, heads, num_features, value_dim)``.
        key_sum: Shape ``(batch, heads, num_features)``.
        log_scale: Shape ``(batch, heads, num_features)``; minus infinity before the first key,
            zero for features without exponent.
        recent_key: The last keys, shape ``(batch, heads, window, head_dim)``; None without window.
            An estimator that balances queries against keys keeps them balanced.
        recent_value: Their values, shape ``(batch, heads, window, value_dim)``.
        recent_mask: Bool, shape ``(batch, window)``: those that take part and are no sinks.
        sink_key: The first keys, shape ``(batch, heads, sinks, head_dim)``; None without sinks.
        sink_value: Their values, shape ``(batch, heads, sinks, value_dim)``.
        sink_mask: Bool, shape ``(batch, sinks)``: those that have been seen.
    """

    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor
    recent_key: Tensor | None = None
    recent_value: Tensor | None = None
    recent_mask: Tensor | None = None
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    sink_mask: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def reorder_(self, index: Tensor) -> "FavorState":
        """Select batch rows in place, as beam search does: row ``i`` becomes ``index[i]``.

        Args:
            index: Integer tensor of shape ``(new_batch,)``.

        Returns:
            Self.
        """
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor.index_select(0, index.to(tensor.device)))
        return self

    def detach(self) -> "FavorState":
        """The same state outside the autograd graph (truncated back-propagation)."""
        return self._mapped(Tensor.detach)

    def clone(self) -> "FavorState":
        """A copy that shares no memory."""
        return self._mapped(torch.clone)

    def to(self, device: torch.device | str) -> "FavorState":
        """The same state on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def exact_keys(self) -> tuple[Tensor | None, ...]:
        """Fields besides the sums."""
        recent = (self.recent_key, self.recent_value, self.recent_mask)
        return (*recent, self.sink_key, self.sink_value, self.sink_mask)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "FavorState":
        return FavorState(**{name: function(x) for name, x in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


def checked_state(
    state: FavorState,
    call: "AttentionCall",
    key: Tensor,
    value: Tensor,
    num_features: int,
    dtype: torch.dtype,
) -> FavorState:
    """The past of a call, with sums in ``dtype``.

    Args:
        state: What the call was given.
        call: The call.
        key: Its keys, one head for each of the feature map's heads.
        value: Its values, likewise.
        num_features: Features of a key.
        dtype: The dtype to compute in.

    Raises:
        ValueError: The state belongs to a call of other shapes or options.
    """
    rows = (*key.shape[:2], num_features)
    expected: list[tuple[str, tuple[int, ...], str]] = [
        ("key_value", (*rows, value.shape[-1]), "batch, heads, num_features, Dv"),
        ("key_sum", rows, "batch, heads, num_features"),
        ("log_scale", rows, "batch, heads, num_features"),
    ]
    for name, kind, count in (("window", "recent", call.window), ("sinks", "sink", call.sinks)):
        mask = getattr(state, f"{kind}_mask")
        before = None if mask is None else mask.shape[-1]
        now = count or None if name == "sinks" else count
        if before != now:
            raise ValueError(
                f"state was made with {name}={before}, but the call has {name}={now}: continue "
                f"with the {name} that the sequence began with"
            )
        if now is not None:
            rows = (*key.shape[:2], now)
            expected += [
                (f"{kind}_key", (*rows, key.shape[-1]), f"batch, heads, {name}, D"),
                (f"{kind}_value", (*rows, value.shape[-1]), f"batch, heads, {name}, Dv"),
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
    sums = (x.to(dtype) for x in (state.key_value, state.key_sum, state.log_scale))
    return FavorState(*sums, *state.exact_keys())


# A saved state loads with torch.load as it is, without trusting arbitrary pickles.
torch.serialization.add_safe_globals([FavorState])
