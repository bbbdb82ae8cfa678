"""Linformer (Wang et al. 2020, arXiv 2006.04768): keys and values projected along the sequence."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.models.context import AttentionContext


class LinformerMechanism(nn.Module):
    """``softmax(Q (E K)^T / sqrt(d)) F V`` with trained ``E`` and ``F`` of shape ``(rank, L_max)``.

    ``O(L * rank)``. All heads of a layer share ``E`` and ``F`` (the paper's headwise sharing,
    section 4). Masked keys and values are zeroed, and tokens take their columns of ``E`` and ``F``
    by their place among the tokens that are not masked, so that padding changes nothing. A mixture
    of all positions has no causal form and cannot keep packed sequences apart.

    Args:
        rank: Rows of ``E`` and ``F``: keys that are left.
        max_length: Columns: the longest input.
    """

    def __init__(self, rank: int, max_length: int) -> None:
        super().__init__()
        self.key_projection = nn.Parameter(torch.empty(rank, max_length))
        self.value_projection = nn.Parameter(torch.empty(rank, max_length))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both projections from N(0, 1 / rank), as in the paper's theorem 2."""
        for projection in (self.key_projection, self.value_projection):
            projection.normal_(0.0, projection.shape[0] ** -0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``.

        The matrix, when asked for, is ``softmax(Q (E K)^T / sqrt(d)) F``, ``(B, H, L, L)``: what
        multiplies the values. Its entries may be negative and its rows do not sum to one.

        Raises:
            ValueError: The call is causal or packed, or a row is too long.
        """
        if context.is_causal:
            raise ValueError(
                "attention='linformer' has no causal form: a projected key mixes all positions"
            )
        if context.sequence_ids is not None:
            raise ValueError(
                "attention='linformer' cannot keep packed sequences apart: leave out sequence_ids "
                "and pass one sequence in a row with an attention_mask, or use another attention"
            )
        mask, length = context.key_mask, key.shape[-2]
        order = None
        if mask is not None:
            order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
            key, value = (
                _take(x.masked_fill(~mask[:, None, :, None], 0.0), order) for x in (key, value)
            )
        longest = length if mask is None else int(mask.sum(-1).max())
        limit = self.key_projection.shape[1]
        if longest > limit:
            raise ValueError(
                f"the input has {longest} tokens but attention='linformer' was built for at most "
                f"{limit}: shorten the input, or train a model with a larger "
                "max_position_embeddings"
            )
        kept = min(length, limit)
        key, value = (
            projection[:, :kept].to(x.dtype) @ x[:, :, :kept]
            for projection, x in ((self.key_projection, key), (self.value_projection, value))
        )
        out = F.scaled_dot_product_attention(query, key, value)
        if mask is not None:
            out = out.masked_fill(~mask[:, None, :, None], 0.0)
        if not context.need_weights:
            return out, None
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = scores.softmax(-1) @ self.value_projection[:, :kept].to(query.dtype)
        weights = F.pad(weights, (0, length - kept))
        if mask is not None and order is not None:
            places = order.argsort(dim=-1)[:, None, None, :].expand_as(weights)
            weights = weights.gather(-1, places)
            weights = weights.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), 0.0)
        return out, weights

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        rank, max_length = self.key_projection.shape
        return f"rank={rank}, max_length={max_length}"


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of ``(B, H, L, width)`` in another order ``(B, L)``."""
    return x.gather(2, order[:, None, :, None].expand_as(x))
