"""Parts of a row, and the keys of lists, by the kernels."""

import math
from functools import partial

import pytest
import torch

from performers import LearnedFeatures, ListedKeys, SoftmaxFeatures, favor_attention
from performers.attention.call import AttentionCall
from performers.attention.native.listed_operators import (
    kernel_rows,
    listed_backward,
    listed_forward,
)
from performers.attention.native.operators import favor_backward, favor_forward
from performers.attention.operators import Inputs
from performers.attention.torch_backend.blocks import Features
from performers.attention.torch_backend.listed import _dense_rows, listed_pairs
from tests.attention.native.support import NATIVE, threads
from tests.features.cases import generator

pytestmark = NATIVE
HEADS, DIM, VALUE_DIM = 2, 12, 10


def problem_of(
    length=150,
    *,
    is_causal=False,
    window=5,
    sinks=2,
    groups=2,
    masked=True,
    listed_keys=None,
    num_heads=HEADS,
    features=None,
):
    random = generator(0)
    query = torch.randn(2, HEADS * groups, length, DIM, generator=random)
    key = torch.randn(2, HEADS, length, DIM, generator=random)
    value = torch.randn(2, HEADS, length, VALUE_DIM, generator=random)
    mask = torch.rand(2, length, generator=random) < 0.8 if masked else None
    if features is None:
        features = SoftmaxFeatures(DIM, 32, num_heads=num_heads, generator=random)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    call = AttentionCall(
        *leaves,
        features,
        is_causal=is_causal,
        key_mask=mask,
        window=window,
        sinks=sinks,
        listed_keys=listed_keys,
    )
    return call.checked(), leaves


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (5, 2), (None, 2), (200, 1), (0, 0)])
def test_parts_make_up_the_whole(is_causal, window, sinks):
    """Joined by their normalisers they are the whole call, and so are their gradients."""
    results = []
    for parts in (("whole",), ("feature", "exact")):
        problem, leaves = problem_of(is_causal=is_causal, window=window, sinks=sinks)
        found = [favor_forward(*Inputs.of(problem, part)) for part in parts]
        out = found[0][0]
        if len(found) > 1:
            log = torch.stack([x[-1] for x in found])
            shares = log.softmax(0).nan_to_num().float().unsqueeze(-1)
            out = sum(x[0] * share for x, share in zip(found, shares, strict=True))
        upstream = torch.randn(out.shape, generator=generator(1))
        results.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("part", ["feature", "exact"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_gradient_of_a_normaliser(part, is_causal):
    """Of the logarithm alone, against differences along queries, keys and the projection."""
    drawn = SoftmaxFeatures(DIM, 32, num_heads=HEADS, generator=generator(1))
    features = LearnedFeatures(drawn, num_heads=HEADS)
    problem, _ = problem_of(90, is_causal=is_causal, sinks=0, masked=False, features=features)
    upstream = torch.randn(problem.query.shape[:-1], generator=generator(2), dtype=torch.float64)
    if part == "exact" or is_causal:
        # The first rows see no key through features, or have none at all.
        upstream[..., :8] = 0

    def loss(query, key, weight):
        given = problem.replaced(query=query, key=key, form=problem.form._replace(weight=weight))
        log = favor_forward(*Inputs.of(given, part))[-1]
        assert log.dtype == torch.float64
        return (log.where(log.isfinite(), 0.0) * upstream).sum()

    points = [
        x.detach().requires_grad_() for x in (problem.query, problem.key, problem.form.weight)
    ]
    gradients = torch.autograd.grad(loss(*points), points)
    for index, gradient in enumerate(gradients):
        if part == "exact" and index == 2:
            assert bool((gradient == 0).all())
            continue
        step = torch.randn(gradient.shape, generator=generator(3)) * 5e-3
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                moved = [x + sign * step if i == index else x for i, x in enumerate(points)]
                ends.append(loss(*moved))
        expected = float((ends[0] - ends[1]) / 2)
        assert float((gradient * step).sum()) == pytest.approx(expected, rel=1e-2, abs=1e-3)


def buckets_of(count=6, keys=20, rounds=1, refresh=40):
    return ListedKeys(
        DIM,
        count,
        keys,
        num_rounds=rounds,
        refresh=refresh,
        num_heads=HEADS,
        generator=generator(4),
    )


def dense(problem, pairs):
    """What `kernel_rows` gives, by torch in float64."""
    problem = problem.replaced(dtype=torch.float64, form=problem.form.to(torch.float64))
    features = Features(problem.form, math.sqrt(problem.factor), torch.float64)
    pairs = pairs._replace(
        query=pairs.query.double(), key=pairs.key.double(), value=pairs.value.double()
    )
    found = []
    for rows in _dense_rows(problem, features, pairs):
        log = (rows.log_scale + rows.denominator.log()).squeeze(-1)
        found += [rows.out(), log]
    return found


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("count", [1, 3, 25])
@pytest.mark.parametrize(("keys", "rounds"), [(1, 1), (30, 1), (30, 2), (64, 1), (150, 1)])
@pytest.mark.parametrize("num_heads", [None, HEADS])
def test_kernels_agree_with_torch(is_causal, count, keys, rounds, num_heads):
    """Rows of 8 to 64 places, lists within and over a block, for projections with biases."""
    drawn = SoftmaxFeatures(DIM, 40, num_heads=num_heads, generator=generator(5))
    results = []
    for evaluate in (dense, kernel_rows):
        features = LearnedFeatures(drawn, num_heads=num_heads)
        problem, leaves = problem_of(
            is_causal=is_causal, features=features, listed_keys=buckets_of(count, keys, rounds)
        )
        random, losses, values = generator(6), [], []
        for pairs in listed_pairs(problem):
            for x in evaluate(problem, pairs):
                some = x.isfinite()
                x = x.where(some, 0.0).double()
                values += [x.detach(), some]
                losses.append((x * torch.randn(x.shape, generator=random)).sum())
        leaves += features.parameters()
        results.append((*values, *torch.autograd.grad(sum(losses), leaves)))
    for expected, got in zip(*results, strict=True):
        if expected.dtype == torch.bool:
            assert torch.equal(got, expected)
            continue
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            got.double() / scale, expected.double() / scale, rtol=0, atol=2e-5
        )


def results_of(pairs_of=lambda pairs: pairs):
    """Rows and gradients of the kernels, those of trained features as well."""
    drawn = SoftmaxFeatures(DIM, 40, num_heads=HEADS, generator=generator(5))
    features = LearnedFeatures(drawn, num_heads=HEADS)
    problem, leaves = problem_of(features=features, listed_keys=buckets_of(5, 150))
    pairs = pairs_of(listed_pairs(problem)[0])
    found = kernel_rows(problem, pairs)
    losses = [x.where(x.isfinite(), 0.0).sum() for x in found]
    leaves += features.parameters()
    return [x.detach() for x in found], torch.autograd.grad(sum(losses), leaves)


def test_threads_do_not_change_results():
    """But for the order in which tasks' gradients of weights are added up."""
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(results_of())
    for one, other in zip(*results, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(results[0][0], results[1][0], strict=True))


def test_keys_that_are_not_there_may_hold_anything():
    expected = results_of()

    def spoilt(pairs, hostile):
        there = (pairs.position >= 0).unsqueeze(-1)
        assert not bool(there.all())
        key, value = pairs.key.where(there, hostile), pairs.value.where(there, hostile)
        return pairs._replace(key=key, value=value)

    for hostile in (1e30, math.inf, math.nan):
        for one, other in zip(results_of(partial(spoilt, hostile=hostile)), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def arguments(rounds=1):
    """Of the operator, for the last round."""
    features = LearnedFeatures(
        SoftmaxFeatures(DIM, 16, num_heads=HEADS, generator=generator(7)), num_heads=HEADS
    )
    problem, _ = problem_of(24, features=features, listed_keys=buckets_of(3, 6, rounds))
    *_, pairs = listed_pairs(problem)
    tensors = [pairs.query, pairs.key, pairs.value, problem.form.weight, problem.form.bias]
    return (
        *(x.detach().requires_grad_() for x in tensors),
        pairs.row,
        pairs.position,
        pairs.begin,
        pairs.hidden,
        problem.factor,
        24,
        problem.window,
    )


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_contract_of_operators(rounds):
    inputs = arguments(rounds)
    torch.library.opcheck(listed_forward, inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    results = listed_forward(*inputs)
    grads = [torch.randn(x.shape, generator=generator(8), dtype=x.dtype) for x in results]
    for trained in (False, True):
        torch.library.opcheck(listed_backward, (*grads, *inputs, *results, trained))


def test_every_result_is_written(monkeypatch):
    """New memory is poisoned: what a kernel does not write shows up as NaN."""
    given = arguments()
    expected = listed_forward(*given)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        results = listed_forward(*given)
        found = torch.autograd.grad(results[0].sum() + results[2].sum(), given[:5])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("window", [None, 5])
def test_the_contract_of_the_operators_for_a_part(window):
    for part in ("feature", "exact"):
        inputs = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in Inputs.of(problem_of(20, groups=1, window=window)[0], part)
        ]
        torch.library.opcheck(favor_forward, tuple(inputs))
        inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        results = favor_forward(*inputs)
        grad_log = torch.randn(results[-1].shape, generator=generator(9), dtype=torch.float64)
        grad_out = torch.randn(results[0].shape, generator=generator(10))
        torch.library.opcheck(
            favor_backward, (grad_out, None, None, grad_log, *inputs, *results, False)
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiled(is_causal):
    query, key, value = (torch.randn(1, 2, 70, 8, generator=generator(13)) for _ in range(3))
    features = SoftmaxFeatures(8, 16, generator=generator(14))
    listed_keys = ListedKeys(8, 4, 8, refresh=32, generator=generator(15))

    def attend(query):
        return favor_attention(
            query, key, value, features, is_causal=is_causal, window=3, listed_keys=listed_keys,
            backend="native",
        )  # fmt: skip

    given = query.requires_grad_()
    upstream = torch.randn(query.shape, generator=generator(16))
    results = []
    for function in (attend, torch.compile(attend, backend="aot_eager")):
        out = function(given)
        results.append((out.detach(), *torch.autograd.grad(out, given, upstream)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", "torch", "native"])
def test_a_window_beyond_32_bits_is_exact_attention(name):
    query, key, value = (torch.randn(1, 2, 90, 8, generator=generator(17)) for _ in range(3))
    features = SoftmaxFeatures(8, 16, generator=generator(18))
    listed_keys = ListedKeys(8, 4, 12, generator=generator(19))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for window in (90, 2**31, 2**32, 2**40):
        out = favor_attention(
            query, key, value, features, window=window, listed_keys=listed_keys, backend=name
        )
        torch.testing.assert_close(out, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sinks", [0, 2])
def test_keys_of_another_sequence(sinks):
    """As many keys as one likes, where there is no window."""
    random = generator(20)
    query = torch.randn(2, 4, 30, 8, generator=random)
    key, value = (torch.randn(2, 2, 75, 8, generator=random) for _ in range(2))
    features = SoftmaxFeatures(8, 16, generator=random)
    listed_keys = ListedKeys(8, 4, 10, num_heads=2, generator=random)
    found, expected = (
        favor_attention(
            query, key, value, features, sinks=sinks, listed_keys=listed_keys, backend=name
        )
        for name in ("native", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_no_second_derivative():
    query, key, value = (
        torch.randn(1, 1, 20, 8, generator=generator(11)).requires_grad_() for _ in range(3)
    )
    features, listed_keys = SoftmaxFeatures(8, 16), ListedKeys(8, 2, 4)
    out = favor_attention(query, key, value, features, listed_keys=listed_keys, backend="native")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("is_causal", [False, True])
def test_many_listed_keys_of_half_precision(is_causal):
    random = generator(9)
    query, key, value = (
        torch.randn(1, 2, 300, 16, generator=random, dtype=torch.bfloat16) for _ in range(3)
    )
    features = SoftmaxFeatures(16, 64, generator=random)
    listed_keys = ListedKeys(16, 8, 100, num_heads=2, refresh=64, generator=random)
    options = {"is_causal": is_causal, "window": 8, "sinks": 2, "listed_keys": listed_keys}
    found = favor_attention(query, key, value, features, backend="native", **options)
    expected = favor_attention(
        query.float(), key.float(), value.float(), features, backend="reference", **options
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)


def test_an_empty_row_stays_empty():
    """No key takes part: every part of the row is empty, and so is their sum."""
    query, key, value = (torch.randn(1, 2, 40, 8, generator=generator(10)) for _ in range(3))
    mask = torch.zeros(1, 40, dtype=torch.bool)
    features = SoftmaxFeatures(8, 16, generator=generator(11))
    listed_keys = ListedKeys(8, 4, 8, generator=generator(12))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = favor_attention(
        *leaves, features, key_mask=mask, window=3, listed_keys=listed_keys, backend="native"
    )
    assert bool((out == 0).all())
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), leaves))
