"""Errors of kernel estimates and of the attention built on them, block of rows by block."""

import torch
from torch import Tensor

from performers.features import FeatureMap

MEASURES = ("kernel_mse", "kernel_relative", "matrix_error", "output_mse", "output_error")
"""What ``kernel_errors`` returns for each feature map.

With the kernel matrix ``A_ij = exp(scale q_i . k_j)``, its estimate ``K``, the attention matrices
``W = A / rowsum(A)`` and ``V = K / rowsum(K)``, and values ``v``:

* ``kernel_mse``: mean of ``(K_ij - A_ij)^2``.
* ``kernel_relative``: mean of ``(K_ij / A_ij - 1)^2``.
* ``matrix_error``: ``|V - W| / |W|``, Frobenius norms.
* ``output_mse``: mean of ``(V v - W v)^2`` over all elements.
* ``output_error``: ``|V v - W v| / |W v|``.
"""

# Rows at a time: a block of 4,096 columns stays in the caches of a core, or nearly so.
_BLOCK_ROWS = 256


@torch.no_grad()
def kernel_errors(
    feature_map: FeatureMap, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> dict[str, float]:
    """Errors of a feature map on one problem; ``MEASURES`` says which.

    Memory is that of the features and of a block of 256 rows of the matrices, whatever the number
    of rows. Features are not stabilised: where an exponent passes 88, errors are not finite.

    Args:
        feature_map: With one projection for all heads.
        query: Shape ``(L, head_dim)``.
        key: Shape ``(S, head_dim)``.
        value: Shape ``(S, value_dim)``.
        scale: Of the scores.

    Returns:
        The errors by name.
    """
    length, size = query.shape[0], key.shape[0]
    query_features = feature_map(query[None], scale, is_query=True)[0]
    key_features = feature_map(key[None], scale)[0].mT
    scaled_key = (scale * key).mT
    # Fresh memory for every step of every block would cost more than the arithmetic.
    block = min(_BLOCK_ROWS, length)
    buffers = [query.new_empty(block, size) for _ in range(3)]
    totals = torch.zeros(4, dtype=torch.float64, device=query.device)
    matrix_norm = output_norm = torch.zeros((), dtype=torch.float64, device=query.device)
    for rows, features in zip(query.split(block), query_features.split(block), strict=True):
        exact, estimate, difference = (buffer[: rows.shape[0]] for buffer in buffers)
        torch.mm(rows, scaled_key, out=exact).exp_()
        torch.mm(features, key_features, out=estimate)
        kernel = _square(torch.sub(estimate, exact, out=difference))
        relative = _square(torch.div(estimate, exact, out=difference).sub_(1))
        exact /= exact.sum(-1, keepdim=True)
        estimate /= estimate.sum(-1, keepdim=True)
        matrix = _square(torch.sub(estimate, exact, out=difference))
        outputs = _square(difference @ value)
        totals += torch.stack((kernel, relative, matrix, outputs))
        matrix_norm = matrix_norm + _square(exact)
        output_norm = output_norm + _square(exact @ value)
    pairs = length * size
    errors = (
        totals[0] / pairs,
        totals[1] / pairs,
        (totals[2] / matrix_norm).sqrt(),
        totals[3] / (length * value.shape[-1]),
        (totals[3] / output_norm).sqrt(),
    )
    return dict(zip(MEASURES, torch.stack(errors).tolist(), strict=True))


def _square(x: Tensor) -> Tensor:
    """The sum of the squares, float64."""
    flat = x.flatten()
    total = torch.dot(flat, flat).double()
    # Relative errors of trigonometric features can be finite with squares that float32 cannot hold.
    return total if bool(total.isfinite()) else flat.double().square().sum()
