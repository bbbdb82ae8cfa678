"""Graphs of PyTorch Geometric as arguments of ``favor_attention``."""

import torch
from torch import Tensor
from torch.nn import functional as F


def graph_boundaries(batch: Tensor) -> Tensor:
    """Boundaries of the graphs of a batch, the ``cu_seqlens`` of ``favor_attention``.

    Args:
        batch: The graph of each node, shape ``(N,)``, int64, in ascending order; numbers that do
            not occur are graphs without nodes.

    Returns:
        Shape ``(graphs + 1,)``, int64: graph ``i`` has the nodes from entry ``i`` up to, without,
        entry ``i + 1``.

    Raises:
        ValueError: ``batch`` has another shape or dtype, a negative number, or is not sorted.
    """
    if batch.ndim != 1 or batch.dtype != torch.int64:
        raise ValueError(
            f"batch must be an int64 tensor (N,), got {batch.dtype} {tuple(batch.shape)}"
        )
    if bool((batch < 0).any()):
        raise ValueError("batch must number the graphs from 0, but holds a negative number")
    if bool((batch[1:] < batch[:-1]).any()):
        raise ValueError(
            "batch must be sorted, the nodes of a graph next to each other: reorder the nodes by "
            "batch.argsort(stable=True), and edges and outputs with them"
        )
    return F.pad(torch.bincount(batch).cumsum(0), (1, 0))
