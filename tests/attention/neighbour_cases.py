"""Graphs, calls with neighbours, and their oracle."""

import math

import torch
from torch.nn import functional as F

import performers
from performers import SoftmaxFeatures, favor_attention

# The compiled kernels take float32 and shorter.
BACKENDS = ("torch", "reference")
LINEAR = tuple(name for name in performers.backends() if name in ("native", "torch"))
SHORT = tuple(name for name in (*BACKENDS, "native") if name in performers.backends())
DIM, WIDTH = 8, 6


def generator(seed):
    return torch.Generator().manual_seed(seed)


def edges(length, size=None, degree=4, seed=0, blocks=None):
    """A random graph of isolated nodes, hubs and self loops: CSR and the matrix it is made from."""
    size = length if size is None else size
    matrix = torch.rand(length, size, generator=generator(seed)) < degree / size
    matrix.fill_diagonal_(True)
    matrix[length // 2] = False
    matrix[:, size // 2] = False
    matrix[length // 3] = True
    if blocks is not None:
        matrix &= torch.block_diag(*(torch.ones(n, n) for n in blocks)).bool()
    indptr = F.pad(matrix.sum(1).cumsum(0), (1, 0))
    return (indptr, matrix.nonzero()[:, 1]), matrix


def inputs(length, size=None, batch=1, heads=2, key_heads=2, dtype=torch.float64, scale=1.5):
    size, random = length if size is None else size, generator(1)

    def draw(*shape):
        x = torch.randn(shape, dtype=torch.float64, generator=random) * scale
        return x.to(dtype).requires_grad_()

    return (
        draw(batch, heads, length, DIM),
        draw(batch, key_heads, size, DIM),
        draw(batch, key_heads, size, WIDTH),
    )


def features(num_features=24, **options):
    return SoftmaxFeatures(DIM, num_features, generator=generator(2), **options)


def oracle(query, key, value, feature_map, matrix, bias=None, key_mask=None, blocks=None):
    """All pairs, in float64, from the formulas."""
    heads = query.shape[1]
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    root, weight = DIM**-0.25, feature_map.weight.double()
    if len(weight) > 1:
        weight = weight.repeat_interleave(heads // len(weight), dim=0)
    logs = [
        (x * root) @ weight.mT - (x * root).square().sum(-1, keepdim=True) / 2 for x in (query, key)
    ]
    log = torch.logsumexp(logs[0].unsqueeze(-2) + logs[1].unsqueeze(-3), dim=-1)
    log = log - math.log(feature_map.num_features)
    exact = query @ key.mT / math.sqrt(DIM)
    if bias is not None:
        place = matrix.nonzero(as_tuple=True)
        every = torch.zeros(heads, *matrix.shape, dtype=torch.float64)
        exact = exact + every.index_put(
            (torch.arange(heads)[:, None], *place), bias.double().expand(heads, -1)
        )
    log = torch.where(matrix, exact, log)
    if blocks is not None:
        same = torch.block_diag(*(torch.ones(n, n) for n in blocks)).bool()
        log = log.masked_fill(~same, -math.inf)
    if key_mask is not None:
        log = log.masked_fill(~key_mask[:, None, None], -math.inf)
    return log.softmax(-1).nan_to_num() @ value


def compare(tensors, feature_map, neighbours, matrix, *, bias=None, backend, tolerance, **options):
    """Outputs, and gradients of inputs and bias, against the oracle."""
    blocks, wanted = options.pop("blocks", None), [*tensors]
    expected = oracle(
        *tensors, feature_map, matrix, bias, key_mask=options.get("key_mask"), blocks=blocks
    )
    if blocks is not None:
        options["cu_seqlens"] = F.pad(torch.tensor(blocks).cumsum(0), (1, 0))
    out = favor_attention(
        *tensors,
        feature_map,
        neighbours=neighbours,
        neighbour_bias=bias,
        backend=backend,
        **options,
    )
    assert out.dtype == tensors[0].dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    wanted += [bias] if bias is not None and bias.requires_grad else []
    upstream = torch.randn(out.shape, generator=generator(5), dtype=torch.float64)
    gradients = torch.autograd.grad((out.double() * upstream).sum(), wanted)
    others = torch.autograd.grad((expected * upstream).sum(), wanted)
    for ours, theirs in zip(gradients, others, strict=True):
        scale = max(theirs.abs().max().item(), 1e-3)
        assert (ours - theirs).abs().max() < 10 * tolerance * scale


def biases(*shape, dtype=torch.float64):
    x = torch.randn(shape, generator=generator(3), dtype=torch.float64)
    return x.to(dtype).requires_grad_()
