"""Positions: rotary (Su et al. 2021), sinusoidal (Vaswani et al. 2017) and learned."""

import math

import torch
from torch import Tensor, nn

from performers.models.arguments import is_tracing


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position * theta^(-2 i / head_dim)``.

    Positions have shape ``(B, L)``, both results ``(B, 1, L, head_dim / 2)`` in float32.
    """
    index = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequency = torch.exp(index * (-math.log(theta) / head_dim))
    angle = position_ids[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair ``(x_i, x_{i + head_dim / 2})`` of ``(B, H, L, head_dim)`` by its angle.

    The result has the shape and dtype of ``x``.
    """
    cosine, sine = angles
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return rotated.to(x.dtype)


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """``sin`` and ``cos`` of ``position * 10000^(-2 i / width)``, concatenated.

    Positions have shape ``(B, L)``, the result ``(B, L, width)`` in float32.
    """
    half = -(-width // 2)
    index = torch.arange(half, device=position_ids.device, dtype=torch.float32)
    frequency = torch.exp(index * (-math.log(10000.0) / half))
    angle = position_ids.unsqueeze(-1).float() * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[..., :width]


class LearnedPositions(nn.Embedding):
    """A vector per position, up to a fixed length."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Look up ``(B, L)`` positions; refuse those beyond the table."""
        if not is_tracing() and position_ids.numel():
            longest = int(position_ids.max()) + 1
            if longest > self.num_embeddings:
                raise ValueError(
                    f"the input has {longest} positions but max_position_embeddings is "
                    f"{self.num_embeddings}: learned positions do not extend; shorten the input "
                    "or train with rotary positions"
                )
        return super().forward(position_ids)
