"""Edges of a graph as the ``neighbours`` of ``favor_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Neighbours = tuple[Tensor, Tensor]
"""Compressed rows: where the keys of each node begin, ``(N + 1,)``, and the keys."""


def neighbours_of(edge_index: Tensor, count: int) -> Neighbours:
    """The nodes with an edge to each node, and the node, each once and rising.

    Args:
        edge_index: ``(2, E)``, from the first row to the second.
        count: Number of nodes.
    """
    loops = torch.arange(count)
    sources, ends = torch.cat([edge_index, torch.stack([loops, loops])], dim=1)
    pairs = torch.unique(ends * count + sources)
    sizes = (pairs // count).bincount(minlength=count)
    return F.pad(sizes.cumsum(0), (1, 0)), pairs % count
