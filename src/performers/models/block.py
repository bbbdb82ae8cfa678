"""The block of a model: attention and a feed-forward network, each on a residual branch."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from performers.models.attention import PerformerSelfAttention, ResidualLinear
from performers.models.configuration import PerformerConfig
from performers.models.context import AttentionContext


class PerformerBlock(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Reversible models call the two branches themselves and never the block, whose hooks do not run;
    see ``run_reversible``.
    """

    def __init__(self, config: PerformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PerformerSelfAttention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_input = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.mlp_output = ResidualLinear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(
        self, hidden_states: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor | None]:
        """From ``(B, L, hidden_size)`` to the same shape, and the attention matrix or None."""
        attended, weights = self.attend(hidden_states, context)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(hidden_states), weights

    def attend(
        self, hidden_states: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor | None]:
        """The first branch, ``attention(norm(x))``, and the attention matrix or None."""
        attended, weights = self.attention(self.attention_norm(hidden_states), context)
        return self.dropout(attended), weights

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """The second branch, ``mlp(norm(x))``, by chunks of tokens if so configured."""
        if not 0 < self.chunk_size < hidden_states.shape[1]:
            return self.dropout(self._mlp(hidden_states))
        chunks = hidden_states.split(self.chunk_size, dim=1)
        if torch.is_grad_enabled():
            outputs = [checkpoint(self._mlp, chunk, use_reentrant=False) for chunk in chunks]
        else:
            outputs = [self._mlp(chunk) for chunk in chunks]
        return self.dropout(torch.cat(outputs, dim=1))

    def _mlp(self, hidden_states: Tensor) -> Tensor:
        inner = self.activation(self.mlp_input(self.mlp_norm(hidden_states)))
        return self.mlp_output(inner)


def run_blocks(
    blocks: nn.ModuleList,
    hidden_states: Tensor,
    context: AttentionContext,
    *,
    keep_hidden_states: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One block after the other; see ``run_reversible`` for what comes back."""
    before: list[Tensor] = []
    matrices: list[Tensor] = []
    for block in blocks:
        if keep_hidden_states:
            before.append(hidden_states)
        hidden_states, weights = block(hidden_states, context)
        if weights is not None:
            matrices.append(weights)
    return hidden_states, before, matrices
