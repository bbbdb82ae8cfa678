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


def neighbour_lists(edge_index: Tensor, num_nodes: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Neighbours of the nodes of a graph, the ``neighbours`` of ``favor_attention``.

    Node ``i`` attends exactly to the sources ``j`` of its edges ``j -> i``, as messages travel in
    PyTorch Geometric. A self loop is a pair like others.

    Args:
        edge_index: Sources and targets, shape ``(2, E)``, int64, each edge once (see
            ``torch_geometric.utils.coalesce``); of a batch, those of all its graphs.
        num_nodes: Number of nodes ``N``.

    Returns:
        ``(indptr, indices)`` of shapes ``(N + 1,)`` and ``(E,)``, and the order of the edges in
        them, shape ``(E,)``: what is attached to edges, such as ``neighbour_bias``, goes into it as
        ``bias[..., order]``.

    Raises:
        ValueError: ``edge_index`` has another shape or dtype, names a node that is not there, or
            has an edge twice.
    """
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"edge_index must be an int64 tensor (2, E), got {edge_index.dtype} "
            f"{tuple(edge_index.shape)}"
        )
    if bool(((edge_index < 0) | (edge_index >= num_nodes)).any()):
        raise ValueError(f"edge_index must name nodes 0..{num_nodes - 1} (num_nodes={num_nodes})")
    source, target = edge_index
    pair, order = (target * num_nodes + source).sort()
    if bool((pair[1:] == pair[:-1]).any()):
        raise ValueError(
            "edge_index must have each edge once: merge those that are there twice with "
            "torch_geometric.utils.coalesce(edge_index, edge_attr)"
        )
    indptr = F.pad(torch.bincount(target, minlength=num_nodes).cumsum(0), (1, 0))
    return (indptr, source[order]), order
