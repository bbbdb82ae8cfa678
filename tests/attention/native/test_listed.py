"""Parts of a row, and the keys of lists, by the kernels."""

import math

import pytest
import torch

from performers import KeyBuckets, LearnedFeatures, SoftmaxFeatures, favor_attention
from performers.attention.blocks import Features, Rows, divide, merge, normalised_rows
from performers.attention.checking import checked_problem
from performers.attention.listed import ListedPairs, dense_pairs
from performers.attention.native import backend
from performers.attention.native.listed import kernel_pairs, listed_backward, listed_forward
from performers.attention.native.operators import favor_backward, favor_forward
from tests.attention.native.support import NATIVE, threads
from tests.features.cases import generator

pytestmark = NATIVE
HEADS, DIM, VALUE_DIM = 2, 12, 10
RESULTS = ("estimate", "estimate_log", "exact", "exact_log")


def problem_of(length=150, *, is_causal=False, window=5, sinks=2, groups=2, masked=True):
    random = generator(0)
    query = torch.randn(2, HEADS * groups, length, DIM, generator=random)
    key = torch.randn(2, HEADS, length, DIM, generator=random)
    value = torch.randn(2, HEADS, length, VALUE_DIM, generator=random)
    mask = torch.rand(2, length, generator=random) < 0.8 if masked else None
    features = SoftmaxFeatures(DIM, 32, num_heads=HEADS, generator=random)
    return checked_problem(
        query, key, value, features, is_causal, mask, None, None, None, False, window, sinks, None
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (5, 2), (None, 2), (200, 1), (0, 0)])
def test_parts_make_up_the_whole(is_causal, window, sinks):
    """Joined by their normalisers they are the whole call, and so are their gradients."""
    results = []
    for parts in (("whole",), ("far", "exact")):
        problem = problem_of(is_causal=is_causal, window=window, sinks=sinks)
        leaves = [x.requires_grad_() for x in (problem.query, problem.key, problem.value)]
        rows = []
        for part in parts:
            out, *_, log_normaliser = favor_forward(*backend.operator_arguments(problem, part))
            rows.append(normalised_rows(out, log_normaliser) if part != "whole" else out)
        if len(rows) > 1:
            joined = merge(*rows, scaled=True)
            out = divide(joined.numerator, joined.denominator)
        upstream = torch.randn(out.shape, generator=generator(1))
        # The sinks' share of the gradient reaches keys and values through their own tensors.
        leaves = leaves if problem.sinks is None else leaves[:1]
        results.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_the_gradient_of_a_normaliser():
    """Of the logarithm alone, against differences."""
    problem = problem_of(90, sinks=0, masked=False)
    for part in ("far", "exact"):
        query = problem.query.clone().requires_grad_()
        log = favor_forward(*backend.operator_arguments(problem._replace(query=query), part))[-1]
        assert log.dtype == torch.float64
        upstream = torch.randn(log.shape, generator=generator(2), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((log * upstream).sum(), query)
        step = torch.randn(query.shape, generator=generator(3)) * 1e-2
        ends = [
            favor_forward(
                *backend.operator_arguments(problem._replace(query=problem.query + x), part)
            )[-1]
            for x in (step, -step)
        ]
        expected = float(((ends[0] - ends[1]) * upstream).sum() / 2)
        assert float((gradient * step).sum()) == pytest.approx(expected, rel=5e-3)


def pairs_of(rows=16, blocks=5, lists=4, keys=70, seed=0):
    """Blocks of lists 0, 0, 2, 3 and one of no list; list 1 has no block, some keys are missing."""
    random = generator(seed)
    begin = torch.tensor([0, 2, 2, 3, 4]).expand(2, HEADS, lists + 1)
    taken = torch.rand(2, HEADS, lists, keys, generator=random) < 0.9
    of_block = torch.tensor([0, 0, 2, 3, 0]).expand(2, HEADS, blocks)
    met = torch.rand(2, HEADS, blocks, keys, rows, generator=random) < 0.7
    index = of_block[..., None].expand(-1, -1, -1, keys)
    met &= taken.gather(2, index).unsqueeze(-1)
    met[0, 0, 1, :, 3] = False
    return ListedPairs(
        torch.randn(2, HEADS, blocks, rows, DIM, generator=random),
        torch.randn(2, HEADS, lists, keys, DIM, generator=random),
        torch.randn(2, HEADS, lists, keys, VALUE_DIM, generator=random),
        taken,
        met,
        of_block,
        begin,
    )


def form_of(num_heads=HEADS, bias=True):
    features = SoftmaxFeatures(DIM, 40, num_heads=num_heads, generator=generator(4))
    if bias:
        features = LearnedFeatures(features, num_heads=num_heads)
    return features, Features(features.form(), math.sqrt(DIM**-0.5), torch.float32)


def sums_of(rows):
    """Rows as numbers that do not depend on their scale."""
    out = divide(rows.numerator, rows.denominator)
    log = rows.log_scale.double() + rows.denominator.double().clamp_min(1e-300).log()
    return out[:, :, :4], log[:, :, :4].masked_fill(rows.denominator[:, :, :4] == 0, 0.0)


@pytest.mark.parametrize("rows", [8, 16, 40, 64])
@pytest.mark.parametrize("keys", [1, 30, 64, 150])
@pytest.mark.parametrize("num_heads", [1, HEADS])
def test_kernels_agree_with_torch(rows, keys, num_heads):
    problem = problem_of()
    results = []
    for evaluate in (dense_pairs, kernel_pairs):
        pairs = pairs_of(rows, keys=keys)
        leaves = [x.requires_grad_() for x in (pairs.query, pairs.key, pairs.value)]
        features, form = form_of(num_heads)
        random = generator(5)
        found = [x for part in evaluate(problem, form, pairs) for x in sums_of(part)]
        loss = sum((x * torch.randn(x.shape, generator=random)).sum() for x in found)
        gradients = torch.autograd.grad(loss, [*leaves, *features.parameters()])
        results.append((*(x.detach() for x in found), *gradients))
    for expected, got in zip(*results, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            got.double() / scale, expected.double() / scale, rtol=0, atol=2e-5
        )


def test_threads_do_not_change_results():
    problem, pairs = problem_of(), pairs_of()
    _, form = form_of()
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(kernel_pairs(problem, form, pairs))
    assert all(
        torch.equal(a, b) for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_keys_that_are_not_taken_may_hold_anything():
    problem, pairs = problem_of(), pairs_of()
    _, form = form_of()
    expected = kernel_pairs(problem, form, pairs)
    for hostile in (1e30, math.inf, math.nan):
        key = torch.where(pairs.taken.unsqueeze(-1), pairs.key, hostile)
        value = torch.where(pairs.taken.unsqueeze(-1), pairs.value, hostile)
        found = kernel_pairs(problem, form, pairs._replace(key=key, value=value))
        for x, y in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def given(bias):
    pairs, (_, form) = pairs_of(rows=8, keys=10), form_of(bias=bias)
    weight = form.form.weight.detach()
    tensors = [pairs.query, pairs.key, pairs.value, weight]
    return (
        *(x.requires_grad_() for x in tensors),
        form.form.bias.detach().requires_grad_() if bias else None,
        pairs.taken,
        pairs.met,
        pairs.begin,
        0.3,
    )


@pytest.mark.parametrize("bias", [False, True])
def test_the_contract_of_operators(bias):
    inputs = given(bias)
    torch.library.opcheck(listed_forward, inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    results = listed_forward(*inputs)
    grads = [torch.randn(x.shape, generator=generator(6), dtype=x.dtype) for x in results]
    torch.library.opcheck(listed_backward, (*grads, *inputs, *results, bias))


def test_the_contract_of_the_operators_for_a_part():
    for part in ("far", "exact"):
        inputs = backend.operator_arguments(problem_of(20, groups=1), part)
        torch.library.opcheck(favor_forward, inputs)
        results = favor_forward(*inputs)
        grad_log = torch.randn(results[-1].shape, generator=generator(7), dtype=torch.float64)
        grad_out = torch.randn(results[0].shape, generator=generator(8))
        torch.library.opcheck(
            favor_backward, (grad_out, None, None, grad_log, *inputs[:-1], *results[:-1])
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_many_listed_keys_of_half_precision(is_causal):
    random = generator(9)
    query, key, value = (
        torch.randn(1, 2, 300, 16, generator=random, dtype=torch.bfloat16) for _ in range(3)
    )
    features = SoftmaxFeatures(16, 64, generator=random)
    buckets = KeyBuckets(16, 8, 100, num_heads=2, refresh=64, generator=random)
    options = {"is_causal": is_causal, "window": 8, "sinks": 2, "buckets": buckets}
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
    buckets = KeyBuckets(8, 4, 8, generator=generator(12))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = favor_attention(
        *leaves, features, key_mask=mask, window=3, buckets=buckets, backend="native"
    )
    assert bool((out == 0).all())
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), leaves))


def test_rows_without_a_part():
    out = torch.ones(1, 1, 1, 2, 3)
    rows = normalised_rows(out, torch.tensor([[[[0.5, -math.inf]]]], dtype=torch.float64))
    assert isinstance(rows, Rows)
    assert rows.denominator.flatten().tolist() == [1.0, 0.0]
    assert rows.log_scale.flatten().tolist() == [0.5, 0.0]
