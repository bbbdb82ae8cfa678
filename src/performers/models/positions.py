"""Positions: rotary (Su et al. 2021), sinusoidal (Vaswani et al. 2017), learned and axial."""

import math
from collections.abc import Sequence

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
        _check_length(position_ids, self.num_embeddings)
        return super().forward(position_ids)


class AxialPositions(nn.Module):
    """The sum of a learned vector per coordinate of a place in a grid, such as that of an image.

    Position ``p`` has the coordinates of the ``p``-th cell in raster order, the last axis
    innermost: with the axes (rows, columns, channels) its vector is ``r[p // (W C)] + c[p // C mod
    W] + h[p mod C]``. The tables together have as many vectors as the axes' sum, not their product
    (Ho et al. 2019, arXiv 1912.12180).

    Args:
        shape: Sizes of the axes, the outermost first.
        width: Width of the vectors.
    """

    def __init__(self, shape: Sequence[int], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in shape)
        self.shape = tuple(shape)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Vectors ``(B, L, width)`` of ``(B, L)`` positions; refuse those beyond the grid."""
        _check_length(position_ids, math.prod(self.shape))
        coordinates = torch.unravel_index(position_ids, self.shape)
        vectors = [table(x) for table, x in zip(self.tables, coordinates, strict=True)]
        return torch.stack(vectors).sum(0)


def _check_length(position_ids: Tensor, limit: int) -> None:
    if is_tracing() or not position_ids.numel():
        return
    longest = int(position_ids.max()) + 1
    if longest > limit:
        raise ValueError(
            f"the input has {longest} positions but max_position_embeddings is {limit}: learned "
            "positions do not extend; shorten the input or train with rotary positions"
        )


def counts_up(position_ids: Tensor, present: Tensor) -> bool:
    """True if the tokens of each row that take part are at positions one after the other."""
    if is_tracing():
        return False
    offsets = position_ids - torch.arange(present.shape[1], device=present.device)
    limits = torch.iinfo(offsets.dtype)
    largest = offsets.masked_fill(~present, limits.min).amax(-1)
    return bool((largest <= offsets.masked_fill(~present, limits.max).amin(-1)).all())
