"""The recurrent state of causal attention."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(eq=False)
class FavorState:
    """Everything causal attention remembers of the past, in a size that does not grow.

    With key features ``phi_i(k_j)``, feature ``i`` holds
    ``key_value_i = sum_j phi_i(k_j) v_j e^{-s_i}`` and ``key_sum_i = sum_j phi_i(k_j) e^{-s_i}``,
    where the log scale ``s_i`` is the largest exponent seen so far, so that neither sum can
    overflow or vanish. Float32, or float64 for float64 inputs.

    Attributes:
        key_value: Shape ``(batch, heads, num_features, value_dim)``.
        key_sum: Shape ``(batch, heads, num_features)``.
        log_scale: Shape ``(batch, heads, num_features)``; minus infinity before the first key,
            zero for features without exponent.
    """

    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def reorder_(self, index: Tensor) -> "FavorState":
        """Select batch rows in place, as beam search does: row ``i`` becomes ``index[i]``.

        Args:
            index: Integer tensor of shape ``(new_batch,)``.

        Returns:
            Self.
        """
        for field in fields(self):
            tensor: Tensor = getattr(self, field.name)
            setattr(self, field.name, tensor.index_select(0, index.to(tensor.device)))
        return self

    def detach(self) -> "FavorState":
        """The same state outside the autograd graph (truncated back-propagation)."""
        return FavorState(*(tensor.detach() for tensor in self._tensors()))

    def clone(self) -> "FavorState":
        """A copy that shares no memory."""
        return FavorState(*(tensor.clone() for tensor in self._tensors()))

    def to(self, device: torch.device | str) -> "FavorState":
        """The same state on another device."""
        return FavorState(*(tensor.to(device) for tensor in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


# A saved state loads with torch.load as it is, without trusting arbitrary pickles.
torch.serialization.add_safe_globals([FavorState])
