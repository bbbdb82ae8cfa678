"""Sizes past 2**31: products of length and features, tensors (both slow), and strides; long sums.

The inputs of the long calls repeat one short period. Attention to ``R`` equal copies of the keys is
attention to one copy, and the gradient of a key is that of one copy too (each has ``1 / R`` of the
weight and ``R`` times the queries), so a short call in float64 says what must come out.
"""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import SELF, make_call, random_mask
from tests.attention.native.support import NATIVE, dense_in_logarithms, threads
from tests.features.cases import by_name, generator

pytestmark = [NATIVE, pytest.mark.timeout(1800)]

PERIOD, COPIES = 700, 12_000
BEYOND = 2**31 + 8


@pytest.fixture(autouse=True)
def _two_threads():
    with threads(2):
        yield


def short_call(mode, **sizes):
    defaults = {"batch": 1, "heads": 1, "head_dim": 4, "value_dim": 4, "num_features": 256}
    call = make_call(by_name("positive"), PERIOD, mode, **{**defaults, **sizes})
    call.value = call.value + 1
    return call


def repeated(x, copies=COPIES):
    return x.repeat(1, 1, copies, 1).requires_grad_()


def attend(call, inputs):
    return favor_attention(*inputs, call.feature_map, backend="native", **call.options)


def assert_close(found, expected, tolerance):
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.slow
def test_length_times_features_bidirectional():
    call = short_call("bidirectional")
    dense = call.leaves(torch.float64)
    expected = dense_in_logarithms(dense)
    weight = torch.randn(expected.shape, generator=generator(1))
    wanted = torch.autograd.grad(expected, dense.inputs, weight.double())
    inputs = [repeated(x) for x in call.inputs]
    assert inputs[0].shape[2] * call.feature_map.num_features > 2**31
    out = attend(call, inputs)
    got = torch.autograd.grad(out, inputs, weight.repeat(1, 1, COPIES, 1))
    for copy in (0, COPIES // 3, COPIES - 2, COPIES - 1):
        rows = slice(copy * PERIOD, (copy + 1) * PERIOD)
        assert_close(out[..., rows, :].detach(), expected.detach(), 5e-4)
        for a, b in zip(got, wanted, strict=True):
            assert_close(a[..., rows, :], b, 1e-3)


def last_copy(call):
    """The last period in float64: its rows see all copies before it, and part of their own.

    Returns:
        The output, and leaves: query, key and value of the copies before (as one, that counts
        ``COPIES - 1`` times), key and value of the last.
    """
    query, key, value = (x.detach().double().requires_grad_() for x in call.inputs)
    last_key, last_value = (x.detach().clone().requires_grad_() for x in (key, value))
    logs = [
        call.case.log_phi(call.feature_map, x * call.query.shape[-1] ** -0.25)[0]
        for x in (query, key, last_key)
    ]
    before, within = (
        torch.logsumexp(logs[0].unsqueeze(-2) + log.unsqueeze(-3), -1) for log in logs[1:]
    )
    seen = torch.ones(PERIOD, PERIOD, dtype=torch.bool).tril()
    before = before + torch.tensor(COPIES - 1.0, dtype=torch.float64).log()
    matrix = torch.cat((before, within.masked_fill(~seen, -torch.inf)), -1).softmax(-1)
    out = matrix @ torch.cat((value, last_value), dim=-2)
    return out, (query, key, value, last_key, last_value)


@pytest.mark.slow
def test_length_times_features_causal():
    """The last period against all before it, and its gradients, which reach back to the first."""
    call = short_call("causal")
    expected, leaves = last_copy(call)
    weight = torch.randn(expected.shape, generator=generator(1))
    wanted = torch.autograd.grad(expected, leaves, weight.double())
    inputs = [repeated(x) for x in call.inputs]
    out = attend(call, inputs)
    assert_close(out[..., -PERIOD:, :].detach(), expected.detach(), 5e-4)
    first = dense_in_logarithms(call)
    assert_close(out[..., :PERIOD, :].detach(), first, 5e-4)
    got = torch.autograd.grad(out[..., -PERIOD:, :], inputs, weight)
    last = slice(-PERIOD, None)
    for a, b in zip((x[..., last, :] for x in got), (wanted[0], *wanted[3:]), strict=True):
        assert_close(a, b, 1e-3)
    for copy in (0, COPIES // 3, COPIES - 2):
        rows = slice(copy * PERIOD, (copy + 1) * PERIOD)
        assert (got[0][..., rows, :] == 0).all()
        for a, b in zip(got[1:], wanted[1:3], strict=True):
            # One of many copies has its share of their gradient: small, but to the same digits.
            assert_close(a[..., rows, :] * (COPIES - 1), b, 1e-3)


@pytest.mark.slow
def test_a_query_of_more_than_2_to_the_31_elements():
    """4.4 GB of bfloat16 queries and as much of gradients, few keys."""
    copies = 24_600
    call = short_call("cross", size=50, head_dim=128, value_dim=1, num_features=8)
    call.query, call.key, call.value = (x.bfloat16() for x in call.inputs)
    short = call.leaves()
    expected = short.run("native")
    weight = torch.randn(expected.shape, generator=generator(1)).bfloat16()
    wanted = torch.autograd.grad(expected, short.inputs, weight)
    query = torch.empty(1, 1, copies * PERIOD, 128, dtype=torch.bfloat16)
    assert query.numel() > BEYOND
    query.view(copies, PERIOD, 128).copy_(call.query[0])
    inputs = [query.requires_grad_(), *(x.detach().requires_grad_() for x in call.inputs[1:])]
    out = attend(call, inputs)
    got = torch.autograd.grad(out, inputs, weight.repeat(1, 1, copies, 1))
    for copy in (0, copies // 3, copies - 2, copies - 1):
        rows = slice(copy * PERIOD, (copy + 1) * PERIOD)
        assert torch.equal(out[..., rows, :], expected)
        assert torch.equal(got[0][..., rows, :], wanted[0])
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert_close(a.double() / copies, b.double(), 0.02)


def far_apart(x, dim):
    """The same numbers with the entries of ``dim`` spread over more than 2**31 elements."""
    strides = list(x.contiguous().stride())
    strides[dim] = -(-BEYOND // (x.shape[dim] - 1))
    try:
        view = torch.empty_strided(x.shape, strides, dtype=x.dtype)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        pytest.skip("this machine does not hand out 4.3 GB of memory before it is used")
    return view.copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", SELF)
def test_strides_beyond_2_to_the_31(mode, dim):
    """Views across 4.3 GB of memory, of which only the pages they touch are ever real."""
    call = make_call(by_name("positive"), 3, mode, head_dim=3, value_dim=3, num_features=8)
    call.query, call.key, call.value = (x.bfloat16() for x in call.inputs)
    plain = call.leaves()
    inputs = [far_apart(x.detach(), dim).requires_grad_() for x in call.inputs]
    out, expected = attend(call, inputs), plain.run("native")
    assert torch.equal(out, expected)
    weight = torch.randn(out.shape, generator=generator(2)).bfloat16()
    got = torch.autograd.grad(out, inputs, far_apart(weight, dim))
    wanted = torch.autograd.grad(expected, plain.inputs, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# Keys of long sums, whose rounding grows with them; the longer ones are slow.
LENGTHS = [20_000, pytest.param(200_000, marks=pytest.mark.slow)]


def long_call(name, mode, length):
    sizes = {"batch": 1, "heads": 1, "head_dim": 8, "value_dim": 4, "num_features": 16}
    return make_call(by_name(name), length, mode, **sizes)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mode", SELF)
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_values_with_a_mean(name, mode, length):
    """Sums that grow, of values that do not average out."""
    call = long_call(name, mode, length)
    call.value = call.value + 3
    call.options["key_mask"] = random_mask(1, length, share=0.9)
    expected = call.leaves(torch.float64).run("torch").detach()
    for count in (1, 2):
        with threads(count):
            out = call.run("native")
        assert (out - expected).abs().max() <= 5e-10 * length


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mode", SELF)
def test_gradients_of_long_sums(mode, length):
    call = long_call("positive", mode, length)
    ours, dense = call.leaves(), call.leaves(torch.float64)
    got = torch.autograd.grad((ours.run("native") - 1).square().sum(), ours.inputs)
    wanted = torch.autograd.grad((dense.run("torch") - 1).square().sum(), dense.inputs)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 5e-10 * length * b.abs().max()
