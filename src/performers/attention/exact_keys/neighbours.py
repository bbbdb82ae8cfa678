"""Exact keys along the edges of a graph.

The lists of listed keys, one for each query, are here the rows of a sparse matrix (CSR): query
``i`` meets the keys ``indices[indptr[i]:indptr[i + 1]]`` exactly, all others through features. With
a bias per edge, exact pairs are attention over the edges of a graph (Veličković et al. 2018, graph
attention networks, arXiv 1710.10903), and the features what it lacks: everything else.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from performers.attention.exact_keys.listed_keys import check_positive
from performers.features import FeatureForm

if TYPE_CHECKING:
    from performers.attention.call import AttentionCall

Neighbours = tuple[Tensor, Tensor]
"""``indptr`` and ``indices`` of a sparse matrix in CSR form, queries by keys."""


class NeighbourLists(NamedTuple):
    """The keys that each query meets exactly, the same ones in all heads.

    Attributes:
        query: The query of each pair, shape ``(E,)``, int64, ascending.
        key: Its key, shape ``(E,)``, int64.
        taken: Whether the key takes part, shape ``(batch, E)``, bool; None: all do.
        bias: Added to ``scale q . k``, shape ``(key_heads, groups, E)``, or None.
    """

    query: Tensor
    key: Tensor
    taken: Tensor | None
    bias: Tensor | None

    def pairs(self, length: int, size: int) -> Tensor:
        """Matrix of the pairs, ``(1, 1, 1, length, size)``, bool."""
        matrix = torch.zeros(length, size, dtype=torch.bool, device=self.key.device)
        return matrix.index_put((self.query, self.key), matrix.new_ones(()))[None, None, None]

    def biases(self, length: int, size: int) -> Tensor | None:
        """Matrix of the biases, ``(1, key_heads, groups, length, size)``, zero elsewhere."""
        if self.bias is None:
            return None
        matrix = self.bias.new_zeros(*self.bias.shape[:2], length * size)
        places = (self.query * size + self.key).expand_as(self.bias)
        return matrix.scatter(2, places, self.bias).unflatten(2, (length, size)).unsqueeze(0)


def find_neighbours(call: "AttentionCall", form: FeatureForm) -> NeighbourLists | None:
    """Check the neighbours of a call in the layout of backends, and list them.

    None where no query has any, and no bias.

    Raises:
        ValueError: ``neighbours`` or ``neighbour_bias`` does not fit the features, the shapes or
            another option; an edge is there twice, or joins two packed sequences.
    """
    check_positive("neighbours", form)
    for name, unused in (
        ("is_causal", False),
        ("window", None),
        ("sinks", 0),
        ("listed_keys", None),
    ):
        if getattr(call, name) != unused:
            raise ValueError(
                f"neighbours cannot be combined with {name}: nodes of a graph have no order, and "
                "which pairs are exact is for neighbours to say; leave one of them out"
            )
    indptr, indices = _checked_tensors(call)
    edges = torch.arange(len(indices), device=indices.device)
    query = torch.bucketize(edges, indptr[1:], right=True)
    if not torch.compiler.is_compiling():
        _check_numbers(call, indptr, indices, query)
    bias = call.neighbour_bias
    if bias is not None:
        bias = _checked_bias(bias, call.query, len(indices))
    # A bias of no pairs has a gradient, of no numbers: layers before it are trained as others are.
    if not len(indices) and bias is None:
        return None
    mask = call.key_mask
    return NeighbourLists(query, indices, None if mask is None else mask[:, indices], bias)


def _checked_tensors(call: "AttentionCall") -> Neighbours:
    neighbours, length = call.neighbours, call.query.shape[-2]
    if (
        not isinstance(neighbours, tuple | list)
        or len(neighbours) != 2
        or not all(isinstance(x, Tensor) and x.ndim == 1 for x in neighbours)
        or not all(x.dtype in (torch.int32, torch.int64) for x in neighbours)
    ):
        raise ValueError(
            "neighbours must be a pair (indptr, indices) of one-dimensional integer tensors, the "
            "rows and columns of a sparse matrix in CSR form, queries by keys"
        )
    indptr, indices = neighbours
    if indptr.shape != (length + 1,):
        raise ValueError(
            f"neighbours must have an indptr of shape ({length + 1},), one more than queries, got "
            f"{tuple(indptr.shape)}"
        )
    for x in neighbours:
        if x.device != call.query.device:
            raise ValueError(f"neighbours are on {x.device} but query is on {call.query.device}")
    return indptr.long(), indices.long()


def _check_numbers(call: "AttentionCall", indptr: Tensor, indices: Tensor, query: Tensor) -> None:
    """Check what is in the tensors; the one look at them that a GPU waits for."""
    size, count = call.key.shape[2], len(indices)
    pair = query * size + indices
    outside = (indices < 0) | (indices >= size)
    falls = (indptr[1:] < indptr[:-1]).any() | (indptr[0] != 0) | (indptr[-1] != count)
    unsorted = (pair[1:] <= pair[:-1]).any()
    wrong = [falls, outside.any(), unsorted]
    if call.segments is not None:
        own = call.segments[indices.clamp(0, max(size - 1, 0))] if size else indices
        wrong.append((own != call.segments[query.clamp_max(max(size - 1, 0))]).any())
    falls_, outside_, unsorted_, *crosses = torch.stack(wrong).tolist()
    if falls_:
        raise ValueError(f"neighbours must have an indptr that rises from 0 to the {count} indices")
    if outside_:
        raise ValueError(f"neighbours must have indices of keys, 0..{size - 1}")
    if unsorted_:
        ordered = pair.sort().values
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise ValueError(
                "neighbours must name each key of a query once: merge edges that are there twice, "
                "with torch_geometric.utils.coalesce for example, and their biases"
            )
    if any(crosses):
        raise ValueError(
            "neighbours must stay within a packed sequence, but an edge joins two of cu_seqlens"
        )


def _checked_bias(bias: Tensor, query: Tensor, count: int) -> Tensor:
    """The bias of each query head, shape ``(key_heads, groups, E)``."""
    heads = query.shape[1] * query.shape[2]
    if not isinstance(bias, Tensor) or bias.shape not in ((count,), (heads, count)):
        shape = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(
            f"neighbour_bias must have shape ({count},) or ({heads}, {count}), one number for each "
            f"edge (and head), got {shape}"
        )
    if not bias.is_floating_point() or bias.device != query.device:
        raise ValueError(
            f"neighbour_bias must be a floating-point tensor on {query.device}, got {bias.dtype} "
            f"on {bias.device}"
        )
    return bias.expand(heads, count).unflatten(0, query.shape[1:3])
