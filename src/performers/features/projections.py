"""Random projections: the rows ``w`` of ``W`` in ``exp(w . x - |x|^2 / 2)``.

Each row is N(0, I) on its own, which makes the estimate unbiased. How rows depend on one another
sets its variance: orthogonal rows (Choromanski et al. 2021, section 2.4) and rows at the vertices
of a simplex (Reid et al. 2023) lower that of the positive estimator in every dimension, and so do
rows in opposite pairs, the coupling that the hyperbolic estimator has built in.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from performers.features.couplings import (
    antithetic_rows,
    hadamard_directions,
    orthogonal_directions,
    simplex_directions,
)

Projection = Literal["orthogonal", "gaussian", "simplex", "hadamard", "antithetic"]
PROJECTIONS: tuple[str, ...] = get_args(Projection)


def draw_projection(
    num_rows: int,
    head_dim: int,
    *,
    projection: Projection = "orthogonal",
    regularized: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw ``W``.

    Rows have the lengths of independent Gaussian vectors, and directions by ``projection``:

    * ``"gaussian"``: independent.
    * ``"orthogonal"``: orthogonal within each block of ``head_dim`` rows, Haar-distributed.
    * ``"simplex"``: at cosines ``-1 / (r - 1)`` within each block of ``r = head_dim`` rows; the
      last, shorter block has its own ``r``. Positive features have the least error with it among
      couplings of directions alone for up to ``head_dim`` rows (Reid et al. 2023,
      arXiv 2301.13856).
    * ``"hadamard"``: orthogonal within each block, from fast Walsh-Hadamard butterflies in
      ``O(num_rows * head_dim * log(head_dim))`` operations. Each row is exactly N(0, I); rows
      jointly are only nearly Haar. Where ``head_dim`` is not a power of two, blocks have as many
      rows as the next one and lose their last columns: still exactly N(0, I), no longer
      orthogonal, but with orthogonal columns. The variance of a full block is then as low as
      that of ``"orthogonal"``, that of a part of a block higher (by 4 to 9 % measured for
      ``head_dim`` rows).
    * ``"antithetic"``: blocks of ``2 head_dim`` rows, ``w`` and ``-w`` in turn, with ``w``
      orthogonal. An odd number of rows ends in a single one.

    Args:
        num_rows: Rows to draw.
        head_dim: Length of a row.
        projection: One of the five above.
        regularized: Give every row the length ``sqrt(head_dim)`` exactly (SMREG).
        generator: Source of randomness; torch's default generator when None.

    Returns:
        Float64 tensor of shape ``(num_rows, head_dim)`` on the generator's device (CPU without
        a generator).

    Raises:
        ValueError: ``projection`` is not one of ``PROJECTIONS``.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
    device = torch.device("cpu") if generator is None else generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    total = num_rows
    if projection == "antithetic":
        num_rows = -(-total // 2)
    if projection == "gaussian":
        rows = normal(num_rows, head_dim)
    elif projection in ("orthogonal", "antithetic"):
        rows = orthogonal_directions(num_rows, head_dim, normal)
    elif projection == "simplex":
        rows = simplex_directions(num_rows, head_dim, normal)
    else:
        rows = hadamard_directions(num_rows, 1 << (head_dim - 1).bit_length(), normal)
    if regularized:
        rows = rows[:, :head_dim]
        rows = rows / rows.norm(dim=-1, keepdim=True) * math.sqrt(head_dim)
    elif projection != "gaussian":
        # Before the columns are cut: only a row of the padded length is uniform on a sphere.
        rows = (rows * normal(*rows.shape).norm(dim=-1, keepdim=True))[:, :head_dim]
    return antithetic_rows(rows, total) if projection == "antithetic" else rows
