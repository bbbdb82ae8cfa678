"""GraphAttention: masks, batches, and what PyTorch Geometric asks of its own."""

import copy
import math

import pytest
import torch

pytest.importorskip("torch_geometric")

import torch_geometric
from torch_geometric.nn.attention import PerformerAttention

import performers
from performers.graphs import GraphAttention, graph_boundaries, neighbour_lists

SIZES = [7, 1, 40, 12]


def layer(**options):
    torch.manual_seed(0)
    return GraphAttention(32, heads=4, head_channels=8, **options).eval()


MAPS = {
    "relu": lambda: performers.GeneralizedFeatures(8, 64),
    "softmax": lambda: performers.SoftmaxFeatures(8, 64),
    "sigmoid": lambda: performers.GeneralizedFeatures(8, 64, fn=torch.nn.Sigmoid()),
}


@pytest.fixture(params=MAPS)
def attention(request):
    torch.manual_seed(1)
    return layer(feature_map=MAPS[request.param]())


def nodes(sizes=SIZES):
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.randn(len(batch), 32, generator=torch.Generator().manual_seed(2)), batch


def padded(x, batch):
    sizes = torch.bincount(batch).tolist()
    rows = torch.nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True, padding_value=9.0)
    return rows, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def heads(attention, x):
    """Queries, keys and values of one graph, ``(heads, N, head_channels)``."""
    return [
        f(x).view(len(x), 4, 8).transpose(0, 1) for f in (attention.q, attention.k, attention.v)
    ]


def oracle(attention, x):
    """One graph, in float64, by the matrix of all pairs."""
    attention = copy.deepcopy(attention).double()
    x = x.double()
    q, k, v = heads(attention, x)
    features, weight = attention.feature_map, attention.feature_map.weight.double()
    q, k = (y / math.sqrt(math.sqrt(8)) for y in (q, k))
    if isinstance(features, performers.SoftmaxFeatures):
        q, k = ((y @ weight.mT - y.square().sum(-1, keepdim=True) / 2).exp() for y in (q, k))
    else:
        fn = torch.relu if features.fn == "relu" else torch.sigmoid
        q, k = (fn(y @ weight.mT) + features.epsilon for y in (q, k))
    matrix = q @ k.mT
    out = (matrix / matrix.sum(-1, keepdim=True)) @ v
    return attention.attn_out(out.transpose(0, 1).flatten(1))


def test_a_batch_is_each_graph_alone(attention):
    """Packed, or padded, of which nothing is part of any sum."""
    x, batch = nodes()
    packed = attention(x, batch=batch)
    expected = torch.cat([oracle(attention, part) for part in x.split(SIZES)])
    torch.testing.assert_close(packed.double(), expected, rtol=1e-4, atol=1e-5)
    rows, mask = padded(x, batch)
    torch.testing.assert_close(attention(rows, mask)[mask], packed, rtol=1e-6, atol=1e-6)
    alone = attention(x[:7])
    torch.testing.assert_close(packed[:7], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(attention(rows[:1, :7])[0], alone, rtol=1e-6, atol=1e-6)


def test_graphs_without_nodes():
    attention = layer()
    assert attention(torch.empty(0, 32)).shape == (0, 32)
    assert attention(torch.empty(0, 32), batch=torch.empty(0, dtype=torch.int64)).shape == (0, 32)
    x, batch = nodes([3, 0, 4])
    expected = attention(x, batch=batch.clamp_max(1))
    torch.testing.assert_close(attention(x, batch=batch), expected, rtol=0, atol=0)
    rows = attention(torch.randn(2, 4, 32), torch.zeros(2, 4, dtype=torch.bool))
    assert rows.isfinite().all()
    assert graph_boundaries(torch.tensor([0, 0, 2, 2, 2])).tolist() == [0, 2, 2, 5]


def test_the_constructor_and_call_of_pytorch_geometric():
    """Its own test of its layer, and all its arguments by position."""
    x, mask = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    attention = GraphAttention(channels=16, heads=4)
    assert isinstance(attention, PerformerAttention)
    assert attention(x, mask).shape == (1, 4, 16)
    assert attention.head_channels == 64
    assert "heads=4, head_channels=64" in str(attention)
    attention = GraphAttention(16, 4, None, torch.nn.ReLU(), True, False, 0.5)
    assert attention.head_channels == 4
    assert attention.q.bias is not None
    assert attention.attn_out.bias is None
    assert (attention(x, mask) == 0).any()
    assert attention.feature_map.fn == "relu"
    before = attention.feature_map.weight.clone()
    attention.redraw_projection_matrix()
    assert not torch.equal(attention.feature_map.weight, before)


def test_weights_of_pytorch_geometric_load():
    theirs = PerformerAttention(32, 4, 8)
    ours = layer()
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert result.missing_keys == ["feature_map.weight"]
    assert result.unexpected_keys == ["fast_attn.projection_matrix"]
    assert torch.equal(ours.v.weight, theirs.v.weight)


def test_neighbours_of_a_batch():
    """Edges exact, each graph alone or in a batch, dense where all nodes are neighbours."""
    attention, (x, batch) = layer(feature_map=performers.SoftmaxFeatures(8, 32)), nodes()
    edges = [
        batch.eq(graph).nonzero()[:, 0][torch.randint(count, (2, 3 * count))]
        for graph, count in enumerate(SIZES)
    ]
    edges = torch_geometric.utils.coalesce(torch.cat(edges, dim=1))
    neighbours, order = neighbour_lists(edges, len(x))
    bias = torch.randn(4, edges.shape[1])
    options = {"neighbours": neighbours, "neighbour_bias": bias[:, order]}
    out = attention(x, batch=batch, **options)
    mine = (edges < 7).all(0)
    neighbours, order = neighbour_lists(edges[:, mine], 7)
    options = {"neighbours": neighbours, "neighbour_bias": bias[:, mine][:, order]}
    torch.testing.assert_close(attention(x[:7], **options), out[:7], rtol=1e-6, atol=1e-6)
    every = torch.cartesian_prod(torch.arange(7), torch.arange(7)).T
    neighbours, _ = neighbour_lists(every, 7)
    exact = torch.nn.functional.scaled_dot_product_attention(*heads(attention, x[:7]))
    expected = attention.attn_out(exact.transpose(0, 1).flatten(1))
    torch.testing.assert_close(attention(x[:7], neighbours=neighbours), expected, rtol=0, atol=1e-5)


def test_neighbours_are_the_sources_of_edges():
    edges = torch.tensor([[2, 0, 1, 1], [0, 1, 1, 0]])
    (indptr, indices), order = neighbour_lists(edges, 4)
    assert indptr.tolist() == [0, 2, 4, 4, 4]
    assert indices.tolist() == [1, 2, 0, 1]
    assert order.tolist() == [3, 0, 1, 2]


def attend(*shape, **options):
    return layer()(torch.randn(shape or (3, 32)), **options)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("batch must be sorted", lambda: attend(batch=torch.tensor([0, 1, 0]))),
        ("batch must number the graphs from 0", lambda: attend(batch=torch.tensor([-1, 0, 0]))),
        (r"batch must have shape \(3,\)", lambda: attend(batch=torch.tensor([0, 0]))),
        ("batch must be an int64 tensor", lambda: attend(batch=torch.zeros(3))),
        ("batch is for nodes", lambda: attend(1, 3, 32, batch=torch.zeros(3).long())),
        ("x must have shape", lambda: attend(3, 16)),
        ("mask is for rows", lambda: attend(mask=torch.ones(1, 3).bool())),
        ("key_mask must be", lambda: attend(1, 3, 32, mask=torch.ones(1, 4).bool())),
        (
            "neighbours needs positive softmax features",
            lambda: attend(neighbours=neighbour_lists(torch.tensor([[0], [1]]), 3)[0]),
        ),
        ("channels must be a positive multiple of heads", lambda: GraphAttention(30, 4)),
        (
            "feature_map must have head_dim=8",
            lambda: layer(feature_map=performers.SoftmaxFeatures(16)),
        ),
        (
            "kernel and feature_map",
            lambda: layer(kernel=torch.relu, feature_map=performers.SoftmaxFeatures(8)),
        ),
        (
            r"edge_index must be an int64 tensor \(2, E\)",
            lambda: neighbour_lists(torch.zeros(3, 2).long(), 4),
        ),
        (r"an int64 tensor \(2, E\)", lambda: neighbour_lists(torch.zeros(2, 2), 4)),
        (
            r"edge_index must name nodes 0\.\.3",
            lambda: neighbour_lists(torch.tensor([[0, 4], [1, 1]]), 4),
        ),
        (r"name nodes 0\.\.3", lambda: neighbour_lists(torch.tensor([[0, -1], [1, 1]]), 4)),
        (
            "edge_index must have each edge once",
            lambda: neighbour_lists(torch.tensor([[0, 1, 0], [1, 1, 1]]), 4),
        ),
    ],
)
def test_refusals(message, call):
    with pytest.raises(ValueError, match=message):
        call()
