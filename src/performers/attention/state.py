"""The recurrent state of causal attention."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor


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

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """``key_value``, ``key_sum`` and ``log_scale``."""
        return self.key_value, self.key_sum, self.log_scale

    def exact_keys(self, kind: Literal["recent", "sink"]) -> tuple[Tensor, Tensor, Tensor] | None:
        """The keys kept as they are, their values and their mask; None without."""
        if getattr(self, f"{kind}_mask") is None:
            return None
        return tuple(getattr(self, f"{kind}_{part}") for part in ("key", "value", "mask"))

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

    def forget_(self, rows: Tensor) -> "FavorState":
        """Bring batch rows to the state before the first key, in place of their past.

        Args:
            rows: Bool tensor of shape ``(batch,)``, True for the rows to forget.

        Returns:
            Self.
        """
        # Scales that are zero throughout are those of features without exponent.
        start = -math.inf if bool(self.log_scale.detach().any()) else 0.0
        for name, tensor in self._tensors().items():
            forgotten = rows.to(tensor.device).view(-1, *(1,) * (tensor.ndim - 1))
            empty = start if name == "log_scale" else 0
            setattr(self, name, tensor.masked_fill(forgotten, empty))
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

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "FavorState":
        return FavorState(**{name: function(x) for name, x in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


# A saved state loads with torch.load as it is, without trusting arbitrary pickles.
torch.serialization.add_safe_globals([FavorState])
