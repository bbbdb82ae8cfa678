"""``favor_attention(neighbours=)``: exact along edges, features elsewhere, one normaliser."""

import math

import pytest
import torch
from torch.nn import functional as F

from performers import (
    GeneralizedFeatures,
    ListedKeys,
    SoftmaxFeatures,
    backends,
    favor_attention,
    favor_attention_weights,
)
from performers.attention.torch_backend import neighbours as module
from performers.benchmark.memory import memory_is_measurable, peak_of, run_apart
from tests.attention.cases import (
    LINEAR,
    PLAIN,
    POSITIVE,
    check_against_oracle,
    make_call,
    random_mask,
    trained,
)
from tests.features.cases import by_name, generator, normal

# The compiled kernels take float32 and shorter.
BACKENDS = ("torch", "reference")
SHORT = tuple(name for name in (*BACKENDS, "native") if name in backends())
BLOCKS = [5, 1, 0, 90, 7]


def graph(length, size=None, degree=4, blocks=None):
    """A random matrix of edges, with isolated nodes, hubs and self loops."""
    size = length if size is None else size
    matrix = torch.rand(length, size, generator=generator(0)) < degree / size
    matrix.fill_diagonal_(True)
    matrix[length // 2] = False
    matrix[:, size // 2] = False
    matrix[length // 3] = True
    if blocks is not None:
        matrix &= torch.block_diag(*(torch.ones(n, n) for n in blocks)).bool()
    return matrix


def csr(matrix, order=lambda row: row):
    rows = [order(row.nonzero()[:, 0]) for row in matrix]
    indptr = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return indptr, torch.cat([*rows, torch.empty(0, dtype=torch.int64)])


def make(matrix, bias=None, *, masked=False, blocks=None, case=POSITIVE, order=None, **options):
    """A call on a graph; the bias is shared by heads, or one for each, and of the kind asked."""
    options = {"dtype": torch.float64, "batch": 1, "input_scale": 1.5, **options}
    call = make_call(
        case, len(matrix), "cross", PLAIN, size=matrix.shape[1], head_dim=8, value_dim=6,
        num_features=24, **options,
    )  # fmt: skip
    call.options["neighbours"] = csr(matrix, *([order] if order else []))
    if masked:
        call.options["key_mask"] = random_mask(call.key.shape[0], matrix.shape[1], seed=4)
    if blocks is not None:
        call.options["cu_seqlens"] = torch.tensor([0, *blocks]).cumsum(0)
    if bias is not None:
        heads = () if bias == "shared" else (call.query.shape[1],)
        numbers = normal(*heads, int(matrix.sum()), seed=3)
        if bias == "heavy":
            numbers += 60
        elif bias == "removing":
            numbers[numbers < -0.5] = -math.inf
        call.options["neighbour_bias"] = numbers.to(options["dtype"]).requires_grad_()
    return call


def check(call, backend):
    """Outputs, and gradients of inputs and bias, against the oracle."""
    tolerance = 3e-5 if call.query.dtype == torch.float32 else 1e-9
    if call.case.calibrated:
        tolerance = 1e-6
    check_against_oracle(
        call, backend, value_tolerance=tolerance, gradient_tolerance=10 * tolerance
    )
    bias = call.options.get("neighbour_bias")
    if bias is not None:
        out, (expected, _) = call.run(backend), call.expected()
        weight = normal(*out.shape, seed=5)
        got, wanted = (torch.autograd.grad(x, bias, weight.to(x))[0] for x in (out, expected))
        assert (got - wanted).abs().max() < 10 * tolerance * max(wanted.abs().max().item(), 1e-3)


GRAPHS = {
    "plain": (graph(23), {}),
    "indices in any order": (graph(23), {"order": lambda row: row.flip(0)}),
    "one key head": (graph(23), {"key_heads": 1}),
    "projections": (graph(23), {"num_heads": 2}),
    "rows that share it": (graph(23), {"batch": 3, "masked": True}),
    "two sets of nodes": (graph(11, 17), {}),
    "packed": (graph(103, degree=12, blocks=BLOCKS), {"blocks": BLOCKS, "input_scale": 1.0}),
}
LONG = {
    "few": (graph(23, degree=3), {"masked": True}),
    "many": (graph(300, degree=10), {"masked": True, "batch": 2}),
    "groups": (graph(300, degree=0), {"masked": True, "heads": 4, "key_heads": 2}),
    "packed": (graph(103, degree=12, blocks=BLOCKS), {"blocks": BLOCKS, "masked": True}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [None, "shared", "heads", "heavy", "removing"])
@pytest.mark.parametrize("name", GRAPHS)
def test_outputs_and_gradients_in_float64(backend, bias, name):
    matrix, options = GRAPHS[name]
    check(make(matrix, bias, **options), backend)


@pytest.mark.parametrize("backend", SHORT)
@pytest.mark.parametrize("name", LONG)
def test_outputs_and_gradients_in_float32(backend, name):
    matrix, options = LONG[name]
    check(make(matrix, "heads", dtype=torch.float32, input_scale=1.0, **options), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["hyperbolic", "optimal", "data_aware"])
def test_estimators(backend, name):
    check(make(graph(40), case=by_name(name)), backend)


def test_features_keep_their_heads_in_blocks(monkeypatch):
    """Many nodes: heads one after the other, with projections and biases of their own."""
    monkeypatch.setattr(module, "_FEATURE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(module, "_GATHERED_ELEMENTS", {"cpu": 64})
    check(make(graph(50), "heads", batch=2, heads=6, key_heads=3, num_heads=3), "torch")


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), *((x, torch.float32) for x in SHORT)]
)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_complete_graph_is_exact_attention(backend, dtype, scale):
    """Nothing is left to the features."""
    call = make(torch.ones(70, 70), "heads", masked=True, batch=2, dtype=dtype, input_scale=scale)
    bias, mask = call.options["neighbour_bias"], call.options["key_mask"]
    dense = bias.unflatten(1, (70, 70)).masked_fill(~mask[:, None, None], -math.inf)
    expected = F.scaled_dot_product_attention(*call.inputs, attn_mask=dense)
    torch.testing.assert_close(call.run(backend), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_learned_features():
    results = []
    for backend in BACKENDS:
        call = trained(make(graph(30), num_heads=2))
        call.feature_map.double()
        out = call.run(backend)
        results.append(torch.autograd.grad(out.square().sum(), call.feature_map.parameters()))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_numerical_derivatives():
    call = make(graph(6), "heads", heads=1).leaves()
    options = {"neighbours": call.options["neighbours"]}

    def attend(query, key, value, bias):
        return favor_attention(query, key, value, call.feature_map, neighbour_bias=bias, **options)

    inputs = (*call.inputs, call.options["neighbour_bias"])
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", SHORT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    call = make(graph(40), dtype=dtype, input_scale=1.0)
    out = call.run(backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), call.expected()[0], rtol=0.02, atol=0.02)


def test_the_matrix_of_weights():
    call = make(graph(20), "heads")
    weights = favor_attention_weights(call.query, call.key, call.feature_map, **call.options)
    torch.testing.assert_close(weights @ call.value, call.expected()[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", SHORT)
@pytest.mark.parametrize("shape", [None, (0,), (2, 0)])
def test_without_edges_it_is_the_call_without_neighbours(shape, backend):
    call = make(torch.zeros(20, 20), dtype=torch.float32)
    bias = None if shape is None else torch.empty(shape, requires_grad=True)
    out = call.run(backend, neighbour_bias=bias)
    expected = call.run(backend, neighbours=None)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if bias is not None:
        # As of any other: what makes it is trained.
        assert torch.autograd.grad(out.sum(), bias)[0].shape == shape


def test_graphs_without_nodes_and_nodes_alone():
    assert make(torch.zeros(0, 0)).run().shape == (1, 2, 0, 6)
    for matrix in (torch.zeros(1, 1), torch.ones(1, 1)):
        call = make(matrix, dtype=torch.float32)
        torch.testing.assert_close(call.run(), call.value)
        assert not call.run(key_mask=torch.zeros(1, 1, dtype=torch.bool)).any()


@pytest.mark.parametrize("backend", SHORT)
def test_nan_stays_in_its_graph(backend):
    call = make(graph(11, blocks=[5, 6]), blocks=[5, 6], dtype=torch.float32)
    expected = call.run("torch")
    call.key[0, 0, 2] = math.nan
    out = call.run(backend)
    assert out[:, 0, :5].isnan().all()
    torch.testing.assert_close(out[:, 1], expected[:, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, 0, 5:], expected[:, 0, 5:], rtol=1e-5, atol=1e-5)


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
    options = {"neighbours": (indptr, pair % nodes), "neighbour_bias": bias}
    feature_map = SoftmaxFeatures(dim, 64, generator=generator(2))

    def run():
        out = favor_attention(*tensors, feature_map, **options)
        out.square().sum().backward()
        return out

    peak = peak_of(run).nbytes
    assert all(x.grad.isfinite().all() for x in (*tensors, bias))
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not memory_is_measurable(), reason="the system tells no peak memory")
def test_a_large_graph_fits_in_memory():
    """A matrix of one head would take 14 GB."""
    assert run_apart(peak_of_a_large_graph, threads=1) < 1.5e9


def test_autograd_keeps_no_features_of_pairs():
    nodes, degree, num_features = 500, 8, 512
    indices = [torch.randperm(nodes, generator=generator(i))[:degree] for i in range(nodes)]
    lists = (torch.arange(0, nodes * degree + 1, degree), torch.cat(indices))
    counts = []
    for neighbours in (None, lists):
        call = make_call(POSITIVE, nodes, batch=1, num_features=num_features).leaves()
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        )
        with hooks:
            call.run("torch", neighbours=neighbours)
        counts.append(sum(saved))
    assert counts[1] - counts[0] < nodes * num_features / 2


# torch's compiler makes an instance of autograd functions.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", [name for name in LINEAR if name in SHORT])
def test_compiled_calls(backend):
    """One graph, forward and backward."""
    call = make(graph(30), "heads", dtype=torch.float32).leaves()
    inputs = (*call.inputs, call.options["neighbour_bias"])

    def attend(query, key, value, bias, *neighbours):
        options = {"neighbours": neighbours, "neighbour_bias": bias, "backend": backend}
        return favor_attention(query, key, value, call.feature_map, **options)

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(*inputs, *call.options["neighbours"])
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def lists(indptr, indices):
    return torch.tensor(indptr), torch.tensor(indices, dtype=torch.int64)


GOOD = lists([0, 1, 2, 3], [0, 1, 2])


@pytest.mark.parametrize(
    ("neighbours", "options", "message"),
    [
        (lists([0, 1, 2], [0, 1]), {}, "indptr of shape"),
        (lists([0, 2, 1, 3], [0, 1, 2]), {}, "indptr that rises"),
        (lists([0, 1, 2, 2], [0, 1, 2]), {}, "indptr that rises"),
        (lists([0, 1, 2, 3], [0, 1, 3]), {}, r"indices of keys, 0\.\.2"),
        (lists([0, 1, 2, 3], [0, -1, 2]), {}, r"indices of keys, 0\.\.2"),
        (lists([0, 3, 3, 3], [0, 1, 0]), {}, "each key of a query once"),
        (lists([0, 2, 3, 3], [1, 1, 0]), {}, "each key of a query once"),
        (torch.eye(3), {}, "neighbours must be a pair"),
        ((torch.zeros(4), torch.zeros(0)), {}, "neighbours must be a pair"),
        (GOOD, {"is_causal": True}, "neighbours cannot be combined with is_causal"),
        (GOOD, {"window": 1}, "neighbours cannot be combined with window"),
        (GOOD, {"sinks": 1}, "neighbours cannot be combined with sinks"),
        (GOOD, {"listed_keys": ListedKeys(8)}, "neighbours cannot be combined with listed_keys"),
        (
            lists([0, 1, 2, 3], [0, 2, 2]),
            {"cu_seqlens": torch.tensor([0, 2, 3])},
            "an edge joins two",
        ),
        (GOOD, {"neighbour_bias": torch.zeros(2)}, r"neighbour_bias must have shape \(3,\)"),
        (GOOD, {"neighbour_bias": torch.zeros(3).long()}, "floating-point"),
        (GOOD, {"neighbour_bias": 1.0}, r"neighbour_bias must have shape \(3,\)"),
        (None, {"neighbour_bias": torch.zeros(3)}, "neighbour_bias needs neighbours"),
        (GOOD, {"is_causal": True, "return_state": True}, "cannot be combined with"),
    ],
)
def test_what_does_not_fit_is_refused(neighbours, options, message):
    with pytest.raises(ValueError, match=message):
        make(torch.eye(3)).run(**{"neighbours": neighbours, **options})


@pytest.mark.parametrize(
    "feature_map", [GeneralizedFeatures(8), SoftmaxFeatures(8, estimator="trigonometric")]
)
def test_other_kernels_are_refused(feature_map):
    call = make(torch.eye(3))
    call.feature_map = feature_map
    with pytest.raises(ValueError, match="neighbours needs positive softmax features"):
        call.run()


def test_a_call_leaves_its_graph_alone():
    call = make(graph(20))
    before = [x.clone() for x in call.options["neighbours"]]
    call.run()
    assert all(map(torch.equal, call.options["neighbours"], before))
