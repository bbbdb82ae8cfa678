"""Attention on graphs, for PyTorch Geometric."""

try:
    import torch_geometric  # noqa: F401
except ImportError as error:
    raise ImportError(
        "performers.graphs needs torch_geometric >= 2.6; install it with "
        f"pip install 'performers[graphs]' ({error})"
    ) from error

from performers.graphs.attention import GraphAttention
from performers.graphs.replacement import replace_
from performers.graphs.structure import graph_boundaries, neighbour_lists

__all__ = ["GraphAttention", "graph_boundaries", "neighbour_lists", "replace_"]
