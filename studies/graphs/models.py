"""GPS models whose layers differ in their attention alone, of one size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GINEConv, GPSConv, SAGEConv, global_add_pool
from torch_geometric.nn.attention import PerformerAttention
from torch_geometric.utils import add_self_loops, coalesce

from performers import SoftmaxFeatures
from performers.graphs import GraphAttention, neighbour_lists, replace_
from studies.graphs.debian import GRAMS, NodeTask
from studies.graphs.molecules import WALKS

NOTHING = "no attention"
EXACT = "exact"
PYG = "PyG's Performer"
PYG_BIASED = "PyG's Performer, biases"
OURS = "ours"
EDGES = "ours, edges exact"
ATTENTIONS = (NOTHING, EXACT, PYG, PYG_BIASED, OURS, EDGES)
SAGE, GAT = "SAGE", "GAT"
NODE_MODELS = {
    "SAGE": (SAGE, NOTHING),
    "GAT": (GAT, NOTHING),
    "SAGE, ours": (SAGE, OURS),
    "SAGE, ours, edges exact": (SAGE, EDGES),
}
"""Convolution and attention of the layers on packages."""
WIDTH, NODE_WIDTH = 64, 32
"""Widths of the models of molecules and of packages."""
HEAD = 16
FEATURES = 44
"""As many as PyG's Performer draws for a head of 16."""


Neighbours = tuple[Tensor, Tensor]
"""The ``neighbours`` of ``favor_attention``."""


class NodeMap(PerformerAttention):
    """A map of each node for itself, with as many parameters as attention, in its place.

    ``GPSConv`` calls an attention only if it is PyG's.
    """

    def __init__(self, channels: int) -> None:
        nn.Module.__init__(self)
        self.map = _two_layers(channels, 2 * channels, channels)

    __repr__ = nn.Module.__repr__

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The map of ``(B, N, channels)``."""
        return self.map(x)


class EdgeAttention(GraphAttention):
    """Softmax attention, exact on edges and by features elsewhere, with one normaliser.

    ``neighbours`` are those of all nodes of the batch, set before each call (`set_neighbours`):
    ``GPSConv`` hands no edges to its attention.
    """

    neighbours: Neighbours | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Attention among the nodes of each row of ``(B, N, channels)`` that ``mask`` names."""
        if mask is None:
            return super().forward(x, neighbours=self.neighbours, **options)
        batch = mask.nonzero()[:, 0] if len(x) > 1 else None
        out = torch.zeros_like(x)
        out[mask] = super().forward(x[mask], batch=batch, neighbours=self.neighbours, **options)
        return out


def neighbours_of(edge_index: Tensor, count: int) -> Neighbours:
    """The nodes with an edge to each node, and the node itself."""
    edges = coalesce(add_self_loops(edge_index, num_nodes=count)[0])
    return neighbour_lists(edges, count)[0]


def set_neighbours(model: nn.Module, neighbours: Neighbours) -> None:
    """Hand neighbours to the layers that attend to them exactly."""
    for module in model.modules():
        if isinstance(module, EdgeAttention):
            module.neighbours = neighbours


def gps_layer(
    attention: str, conv: nn.Module | None, width: int = WIDTH, momentum: float = 0.1
) -> GPSConv:
    """A layer of GPS with batch normalisation and heads of 16.

    Queries, keys and values have biases, as those of exact attention, but for `PYG`, which has none
    by default. Its heads have a width of 64 by default; here they have that of the others.
    """
    heads, norm = width // HEAD, {"momentum": momentum}
    if attention == EXACT:
        return GPSConv(width, conv, heads=heads, attn_type="multihead", norm_kwargs=norm)
    options = {"head_channels": HEAD, "qkv_bias": attention != PYG}
    layer = GPSConv(
        width, conv, heads=heads, attn_type="performer", attn_kwargs=options, norm_kwargs=norm
    )
    if attention == NOTHING:
        layer.attn = NodeMap(width)
    elif attention == OURS:
        replace_(layer, num_features=FEATURES)
    elif attention == EDGES:
        features = SoftmaxFeatures(HEAD, FEATURES)
        layer.attn = EdgeAttention(width, heads, None, qkv_bias=True, feature_map=features)
    return layer


class MoleculeModel(nn.Module):
    """GPS with GINE: a number for each molecule."""

    def __init__(self, attention: str, layers: int, atoms: int, bonds: int) -> None:
        super().__init__()
        self.atoms = nn.Embedding(atoms, WIDTH)
        self.walks = nn.Linear(WALKS, WIDTH)
        self.bonds = nn.Embedding(bonds, WIDTH)
        self.layers = nn.ModuleList(
            gps_layer(attention, GINEConv(_two_layers(WIDTH, WIDTH, WIDTH))) for _ in range(layers)
        )
        self.head = _two_layers(WIDTH, WIDTH, 1)

    def forward(self, graphs: Any) -> Tensor:
        """Predictions ``(graphs,)`` of a batch of graphs."""
        x = self.atoms(graphs.x) + self.walks(graphs.walks)
        edges = self.bonds(graphs.edge_attr)
        set_neighbours(self, neighbours_of(graphs.edge_index, len(x)))
        for layer in self.layers:
            x = layer(x, graphs.edge_index, batch=graphs.batch, edge_attr=edges)
        return self.head(global_add_pool(x, graphs.batch, size=graphs.num_graphs)).squeeze(-1)


class NodeModel(nn.Module):
    """GPS with SAGE or GAT: logits for each package.

    `set_neighbours` once before the first call.
    """

    def __init__(self, conv: str, attention: str, layers: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Linear(GRAMS + 2, NODE_WIDTH)
        # Every batch is the whole graph: the last one's statistics are those of evaluation.
        self.norm = nn.BatchNorm1d(NODE_WIDTH, momentum=1.0)
        self.dropout = nn.Dropout(0.2)
        self.layers = nn.ModuleList(
            gps_layer(attention, _conv(conv), NODE_WIDTH, momentum=1.0) for _ in range(layers)
        )
        self.head = nn.Linear(NODE_WIDTH, classes)

    def forward(self, task: NodeTask) -> Tensor:
        """Logits ``(N, classes)``."""
        x = self.dropout(self.norm(self.features(task.features)))
        for layer in self.layers:
            x = layer(x, task.edge_index)
        return self.head(x)


def corrected(model: nn.Module) -> nn.Module:
    """A copy in which PyG's Performers are replaced, with their parameters and projections."""
    found = copy.deepcopy(model)
    layers = [x for x in found.modules() if isinstance(x, GPSConv)]
    projections = [layer.attn.fast_attn.projection_matrix for layer in layers]
    replace_(found, num_features=FEATURES)
    for layer, projection in zip(layers, projections, strict=True):
        # Ours multiplies queries and keys by head_dim ** -1/4 first.
        layer.attn.feature_map.weight.copy_(projection * projection.shape[1] ** 0.25)
    return found


def parameters(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(x.numel() for x in model.parameters() if x.requires_grad)


def _two_layers(width: int, inner: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, out))


def _conv(name: str) -> nn.Module:
    if name == SAGE:
        return SAGEConv(NODE_WIDTH, NODE_WIDTH)
    return GATConv(NODE_WIDTH, HEAD, heads=NODE_WIDTH // HEAD)
