"""``favor_attention(neighbours=)``: exact along edges, features elsewhere, one normaliser."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import performers
from performers import (
    LearnedFeatures,
    SoftmaxFeatures,
    favor_attention,
    favor_attention_weights,
)
from performers.benchmark.memory import memory_is_measurable, peak_of, run_apart
from performers.features import FeatureMap
from tests.attention.neighbour_cases import (
    BACKENDS,
    DIM,
    LINEAR,
    SHORT,
    WIDTH,
    biases,
    compare,
    edges,
    features,
    generator,
    inputs,
    oracle,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "shared", "heads"])
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("projections", [None, 2])
def test_outputs_and_gradients_in_float64(backend, kind, key_heads, projections):
    neighbours, matrix = edges(23)
    count = len(neighbours[1])
    bias = {"none": None, "shared": biases(count), "heads": biases(2, count)}[kind]
    tensors, feature_map = inputs(23, key_heads=key_heads), features(num_heads=projections)
    compare(tensors, feature_map, neighbours, matrix, bias=bias, backend=backend, tolerance=1e-9)


@pytest.mark.parametrize("backend", SHORT)
@pytest.mark.parametrize(("length", "degree"), [(23, 3), (300, 10), (300, 0)])
@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"heads": 4, "key_heads": 2}], ids=str)
def test_outputs_and_gradients_in_float32(backend, length, degree, options):
    neighbours, matrix = edges(length, degree=degree)
    bias = biases(options.get("heads", 2), len(neighbours[1]), dtype=torch.float32)
    mask = torch.rand(options.get("batch", 1), length, generator=generator(4)) < 0.8
    tensors = inputs(length, dtype=torch.float32, scale=1.0, **options)
    compare(
        tensors,
        features(),
        neighbours,
        matrix,
        bias=bias,
        backend=backend,
        tolerance=3e-5,
        key_mask=mask,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_share_a_graph(backend):
    """A batch of signals on one graph, some of its nodes masked in each."""
    neighbours, matrix = edges(23)
    mask = torch.rand(3, 23, generator=generator(4)) < 0.7
    bias = biases(2, len(neighbours[1]))
    compare(
        inputs(23, batch=3),
        features(),
        neighbours,
        matrix,
        bias=bias,
        backend=backend,
        tolerance=1e-9,
        key_mask=mask,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_between_two_sets_of_nodes(backend):
    neighbours, matrix = edges(11, 17)
    compare(inputs(11, 17), features(), neighbours, matrix, backend=backend, tolerance=1e-9)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((x, torch.float64) for x in BACKENDS), *((x, torch.float32) for x in SHORT)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_packed_graphs(backend, dtype, masked):
    blocks = [5, 1, 0, 90, 7]
    length = sum(blocks)
    neighbours, matrix = edges(length, degree=12, blocks=blocks)
    mask = {"key_mask": torch.rand(1, length, generator=generator(4)) < 0.7} if masked else {}
    compare(
        inputs(length, dtype=dtype, scale=1.0),
        features(),
        neighbours,
        matrix,
        bias=biases(len(neighbours[1]), dtype=dtype),
        backend=backend,
        tolerance=1e-9 if dtype == torch.float64 else 3e-5,
        blocks=blocks,
        **mask,
    )


def packed(*graphs):
    """Neighbours and boundaries of graphs laid end to end."""
    starts = [0]
    for _, matrix in graphs:
        starts.append(starts[-1] + len(matrix))
    matrix = torch.block_diag(*(matrix for _, matrix in graphs)).bool()
    indptr = F.pad(matrix.sum(1).cumsum(0), (1, 0))
    return (indptr, matrix.nonzero()[:, 1]), torch.tensor(starts)


def test_a_graph_does_not_depend_on_its_batch():
    small, big = edges(9), edges(200, degree=6, seed=7)
    neighbours, cu_seqlens = packed(small, big)
    tensors = inputs(209, dtype=torch.float32)
    out = favor_attention(*tensors, features(), neighbours=neighbours, cu_seqlens=cu_seqlens)
    alone = favor_attention(*(x[:, :, :9] for x in tensors), features(), neighbours=small[0])
    torch.testing.assert_close(out[:, :, :9], alone, rtol=1e-6, atol=1e-6)


def test_nodes_in_another_order_give_outputs_in_that_order():
    neighbours, matrix = edges(60)
    tensors, order = inputs(60, dtype=torch.float32), torch.randperm(60, generator=generator(8))
    renamed = matrix[order][:, order]
    other = (F.pad(renamed.sum(1).cumsum(0), (1, 0)), renamed.nonzero()[:, 1])
    out = favor_attention(*(x[:, :, order] for x in tensors), features(), neighbours=other)
    expected = favor_attention(*tensors, features(), neighbours=neighbours)[:, :, order]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_edges_in_another_order():
    neighbours, matrix = edges(40)
    indptr, indices = neighbours
    tensors, bias = inputs(40), biases(len(indices))
    place = torch.cat([s + torch.randperm(e - s) for s, e in pairwise(indptr)])
    out = favor_attention(
        *tensors, features(), neighbours=(indptr, indices[place]), neighbour_bias=bias[place]
    )
    expected = oracle(*tensors, features(), matrix, bias)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), *((x, torch.float32) for x in SHORT)],
)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_complete_graph_is_exact_attention(backend, dtype, scale):
    """Nothing is left to the features."""
    neighbours = (torch.arange(0, 4901, 70), torch.arange(70).repeat(70))
    mask = torch.rand(2, 70, generator=generator(4)) < 0.7
    tensors = inputs(70, batch=2, dtype=dtype, scale=scale)
    bias = biases(2, 4900, dtype=dtype)
    out = favor_attention(
        *tensors,
        features(),
        neighbours=neighbours,
        neighbour_bias=bias,
        key_mask=mask,
        backend=backend,
    )
    dense = bias.unflatten(1, (70, 70)).masked_fill(~mask[:, None, None], -math.inf)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=dense)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(x.square().sum(), [*tensors, bias]) for x in (out, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_biases_that_outweigh_the_features_are_attention_over_edges():
    """As in graph attention networks: nodes beyond the edges have no weight."""
    neighbours, matrix = edges(50)
    matrix = matrix | torch.eye(50).bool()
    neighbours = (F.pad(matrix.sum(1).cumsum(0), (1, 0)), matrix.nonzero()[:, 1])
    tensors, bias = inputs(50), 60 + biases(2, len(neighbours[1]))
    out = favor_attention(*tensors, features(), neighbours=neighbours, neighbour_bias=bias)
    query, key, value = tensors
    expected = torch.zeros_like(out)
    for head in range(2):
        for node in range(50):
            start, stop = neighbours[0][node], neighbours[0][node + 1]
            keys = neighbours[1][start:stop]
            logits = key[0, head, keys] @ query[0, head, node] / math.sqrt(DIM)
            weights = (logits + bias[head, start:stop]).softmax(0)
            expected[0, head, node] = weights @ value[0, head, keys]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_a_bias_of_minus_infinity_takes_a_pair_out():
    neighbours, matrix = edges(30)
    bias = biases(len(neighbours[1])).detach()
    gone = torch.rand(len(bias), generator=generator(6)) < 0.3
    bias[gone] = -math.inf
    bias.requires_grad_()
    compare(inputs(30), features(), neighbours, matrix, bias=bias, backend="torch", tolerance=1e-9)


@pytest.mark.parametrize("estimator", ["hyperbolic", "optimal", "data_aware"])
def test_estimators(estimator):
    neighbours, _ = edges(40)
    tensors, feature_map = inputs(40), features(32, estimator=estimator)
    feature_map.calibrate_(*tensors[:2])
    results = [
        favor_attention(*tensors, feature_map, neighbours=neighbours, backend=name)
        for name in BACKENDS
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_gradients_of_learned_features():
    neighbours, _ = edges(30)
    results = []
    for backend in BACKENDS:
        learned: FeatureMap = LearnedFeatures(features(), num_heads=2).double()
        out = favor_attention(*inputs(30), learned, neighbours=neighbours, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), learned.parameters()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_numerical_derivatives():
    neighbours, _ = edges(6)
    bias, tensors = biases(len(neighbours[1])), inputs(6, heads=1, key_heads=1)

    def call(query, key, value, bias):
        return favor_attention(
            query, key, value, features(8), neighbours=neighbours, neighbour_bias=bias
        )

    assert torch.autograd.gradcheck(call, (*tensors, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (*tensors, bias), fast_mode=True)


@pytest.mark.parametrize("backend", SHORT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    neighbours, matrix = edges(40)
    tensors = inputs(40, dtype=dtype, scale=1.0)
    out = favor_attention(*tensors, features(), neighbours=neighbours, backend=backend)
    assert out.dtype == dtype
    expected = oracle(*tensors, features(), matrix)
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


def test_the_matrix_of_weights():
    neighbours, matrix = edges(20)
    query, key, value = inputs(20)
    bias = biases(2, len(neighbours[1]))
    weights = favor_attention_weights(
        query, key, features(), neighbours=neighbours, neighbour_bias=bias
    )
    torch.testing.assert_close(
        weights @ value, oracle(query, key, value, features(), matrix, bias), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("backend", SHORT)
@pytest.mark.parametrize("shape", [None, (0,), (2, 0)])
def test_without_edges_it_is_the_call_without_neighbours(shape, backend):
    tensors = inputs(20, dtype=torch.float32)
    neighbours = (torch.zeros(21, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    bias = None if shape is None else torch.empty(shape, requires_grad=True)
    options = {"neighbours": neighbours, "neighbour_bias": bias, "backend": backend}
    out = favor_attention(*tensors, features(), **options)
    expected = favor_attention(*tensors, features(), backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if bias is not None:
        # As of any other: what makes it is trained.
        assert torch.autograd.grad(out.sum(), bias)[0].shape == shape


def test_graphs_without_nodes_and_nodes_alone():
    neighbours = (torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert favor_attention(*inputs(0), features(), neighbours=neighbours).shape == (1, 2, 0, WIDTH)
    for indptr, indices in (([0, 0], []), ([0, 1], [0])):
        tensors = inputs(1, dtype=torch.float32)
        neighbours = (torch.tensor(indptr), torch.tensor(indices, dtype=torch.int64))
        out = favor_attention(*tensors, features(), neighbours=neighbours)
        torch.testing.assert_close(out, tensors[2])
        mask = torch.zeros(1, 1, dtype=torch.bool)
        out = favor_attention(*tensors, features(), neighbours=neighbours, key_mask=mask)
        assert not out.any()


@pytest.mark.parametrize("backend", SHORT)
def test_nan_stays_in_its_graph(backend):
    blocks = [5, 6]
    neighbours, _ = edges(11, blocks=blocks)
    tensors = [x.detach().clone() for x in inputs(11, dtype=torch.float32)]
    expected = favor_attention(
        *tensors, features(), neighbours=neighbours, cu_seqlens=torch.tensor([0, 5, 11])
    )
    tensors[1][0, 0, 2] = math.nan
    out = favor_attention(
        *tensors,
        features(),
        neighbours=neighbours,
        cu_seqlens=torch.tensor([0, 5, 11]),
        backend=backend,
    )
    assert out[:, 0, :5].isnan().all()
    torch.testing.assert_close(out[:, 1], expected[:, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, 0, 5:], expected[:, 0, 5:], rtol=1e-5, atol=1e-5)


def test_the_backend_is_one_that_computes_neighbours():
    neighbours, _ = edges(20)
    tensors = inputs(20, dtype=torch.float32)
    for name in set(performers.backends()) - set(SHORT):
        with pytest.raises(ValueError, match=f"got {name!r}, which does not cover it"):
            favor_attention(*tensors, features(), neighbours=neighbours, backend=name)


def test_features_keep_their_heads_in_blocks(monkeypatch):
    """Many nodes: heads one after the other, with projections and biases of their own."""
    neighbours, matrix = edges(50)
    import performers.attention.torch_backend.neighbours as module

    monkeypatch.setattr(module, "_FEATURE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(module, "_GATHERED_ELEMENTS", {"cpu": 64})
    compare(
        inputs(50, batch=2, heads=6, key_heads=3),
        features(num_heads=3),
        neighbours,
        matrix,
        bias=biases(6, len(neighbours[1])),
        backend="torch",
        tolerance=1e-9,
    )


def peak_of_a_large_graph():
    """Bytes of a forward and backward pass on 60,000 nodes and 280,000 edges."""
    nodes, count, heads, dim = 60_000, 280_000, 4, 16
    pair = torch.randint(nodes * nodes, (count * 11 // 10,), generator=generator(0)).unique()
    pair = pair[torch.randperm(len(pair), generator=generator(0))[:count].sort().values]
    indptr = F.pad(torch.bincount(pair // nodes, minlength=nodes).cumsum(0), (1, 0))
    tensors = [torch.randn(1, heads, nodes, dim, generator=generator(1)) for _ in range(3)]
    bias = torch.zeros(heads, count)
    for x in (*tensors, bias):
        x.requires_grad_()
    feature_map = SoftmaxFeatures(dim, 64, generator=generator(2))

    def run():
        out = favor_attention(
            *tensors, feature_map, neighbours=(indptr, pair % nodes), neighbour_bias=bias
        )
        out.square().sum().backward()
        return out

    peak = peak_of(run).nbytes
    assert all(x.grad.isfinite().all() for x in (*tensors, bias))
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not memory_is_measurable(), reason="the system tells no peak memory")
def test_a_large_graph_fits_in_memory():
    """A matrix of one head would take 14 GB."""
    assert run_apart(partial(peak_of_a_large_graph), threads=1) < 1.5e9


def test_autograd_keeps_no_features_of_pairs():
    nodes, degree, num_features = 500, 8, 512
    indices = torch.stack(
        [torch.randperm(nodes, generator=generator(i))[:degree] for i in range(nodes)]
    )
    lists = (torch.arange(0, nodes * degree + 1, degree), indices.flatten())
    counts = []
    for neighbours in (None, lists):
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        )
        with hooks:
            tensors = inputs(nodes, dtype=torch.float32)
            favor_attention(
                *tensors, features(num_features), neighbours=neighbours, backend="torch"
            )
        counts.append(sum(saved))
    assert counts[1] - counts[0] < nodes * num_features / 2


# torch's compiler makes an instance of autograd functions.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", LINEAR)
def test_compiled_calls(backend):
    """One graph, forward and backward."""
    neighbours, _ = edges(30)
    tensors, feature_map = inputs(30, dtype=torch.float32), features()
    bias = biases(2, len(neighbours[1]), dtype=torch.float32)

    def call(query, key, value, bias, *neighbours):
        options = {"neighbours": neighbours, "neighbour_bias": bias, "backend": backend}
        return favor_attention(query, key, value, feature_map, **options)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(*tensors, bias, *neighbours)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*tensors, bias])))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
