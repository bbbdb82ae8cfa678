"""Linformer (Wang et al. 2020, arXiv 2006.04768): keys and values projected along the sequence."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.app.options import option
from performers.models import PerformerConfig
from studies.comparators.blocks import AttentionOptions, Comparator, SequenceRows

_RANK = 256


@dataclass(frozen=True, kw_only=True)
class LinformerOptions(AttentionOptions):
    """Options of ``linformer``."""

    rank: int | None = option(
        "Keys and values that a sequence is projected to; None is 256, or "
        "max_position_embeddings where that is less.",
        None,
        at_least=1,
    )

    def completed(self, longest: int) -> AttentionOptions:
        """See `AttentionOptions.completed`."""
        return replace(self, rank=self.rank or min(_RANK, longest))


class LinformerMechanism(Comparator):
    """``softmax(Q (E K)^T / sqrt(d)) F V`` with trained ``E`` and ``F`` of shape ``(rank, L_max)``.

    ``O(L * rank)``. All heads of a layer share ``E`` and ``F`` (the paper's headwise sharing,
    section 4). Tokens take their columns of ``E`` and ``F`` by their place among the tokens that
    are not masked, so that padding changes nothing. A mixture of all positions has no causal form
    and cannot keep packed sequences apart. Entries of its matrix may be negative, and rows do not
    sum to one.
    """

    def __init__(self, options: Any, config: PerformerConfig, generator: Any) -> None:
        super().__init__(options, config, generator)
        shape = (options.rank, config.max_position_embeddings)
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both projections from N(0, 1 / rank), as in the paper's theorem 2."""
        for projection in (self.key_projection, self.value_projection):
            projection.normal_(0.0, projection.shape[0] ** -0.5)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`."""
        if rows.is_causal:
            raise ValueError(
                "attention='linformer' has no causal form: a projected key mixes all positions"
            )
        if rows.context.sequence_ids is not None:
            raise ValueError(
                "attention='linformer' cannot keep packed sequences apart: leave out sequence_ids "
                "and pass one sequence in a row with an attention_mask, or use another attention"
            )
        longest, limit = key.shape[2], self.key_projection.shape[1]
        if longest > limit:
            raise ValueError(
                f"the input has {longest} tokens but attention='linformer' was built for at most "
                f"{limit}: shorten the input, or train a model with a larger "
                "max_position_embeddings"
            )
        key, value = (
            projection[:, :longest].to(x.dtype) @ x
            for projection, x in ((self.key_projection, key), (self.value_projection, value))
        )
        return F.scaled_dot_product_attention(query, key, value)
