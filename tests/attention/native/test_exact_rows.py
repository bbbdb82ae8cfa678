"""Causal rows that a later key makes vanish, and that are summed again at a scale of their own.

The features of a chunk stand at the largest exponent of the chunk. A row that may not see the key
with that exponent can underflow; its normaliser tells, and it is computed pair by pair. Such rows
are compared with sums of logarithms in float64. What is left is the rounding of exponents, which
float32 knows to 6e-8 of their size: tolerances are that, times a few.
"""

import pytest
import torch

from tests.attention.cases import CASES, make_call, random_mask, stream
from tests.attention.native.support import (
    NATIVE,
    dense_in_logarithms,
    exact_rows,
    largest_exponent,
    threads,
)
from tests.features.cases import generator

pytestmark = NATIVE

NAMES = ("positive", "hyperbolic", "bias", "exp-no-epsilon")
SCALES = (1.0, 8.0, 15.0, 30.0, 60.0, 300.0)


def causal(name, length=130, **options):
    sizes = {"batch": 1, "heads": 2, "key_heads": 1, "num_features": 32, "head_dim": 16}
    return make_call(CASES[name], length, "causal", **{**sizes, **options})


def hidden_by_short_keys(size, length=150, **options):
    """Long keys that lie close together, so that many share a row, but one short key in 64.

    A short key has by far the largest features, and comes last in its chunk.
    """
    call = causal("positive", length, **{"num_features": 16, **options})
    along = torch.randn(call.key.shape[-1], generator=generator(9))
    call.key = call.key / 2 + size * along / along.norm()
    call.key[..., 63::64, :] *= 0.1 / size
    return call


def check(call, run=None, gradient_size=1.0):
    """Values and gradients within the rounding of exponents."""
    ours, dense = call.leaves(), call.leaves(torch.float64)
    unit = max(largest_exponent(call), 20.0)
    out, expected = (run or (lambda c: c.run("native")))(ours), dense_in_logarithms(dense)
    assert (out - expected).abs().max() <= 4e-7 * unit
    weight = torch.randn(out.shape, generator=generator(3)) * gradient_size
    got = torch.autograd.grad(out, ours.inputs, weight)
    wanted = torch.autograd.grad(expected, dense.inputs, weight.double())
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 2e-6 * unit * max(b.abs().max(), 0.1 * gradient_size)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_any_scale(name, head_dim, scale, masked):
    """Beyond 50 the ``torch`` backend loses pairs; here nothing changes but the exponents' size."""
    call = causal(name, head_dim=head_dim, input_scale=scale, seed=1)
    if masked:
        call.options["key_mask"] = random_mask(1, 130, 2)
    if scale in (1.0, 60.0):
        assert exact_rows(call).any() == (scale > 1)
    check(call)


@pytest.mark.parametrize(
    ("window", "size"), [(0, 15), (0, 60), (20, 4), (20, 60), (63, 15), (64, 60)]
)
def test_beside_a_window(window, size):
    check(hidden_by_short_keys(size, 200, window=window))
    check(causal("positive", 200, input_scale=float(size), window=window))


@pytest.mark.parametrize("size", [20, 30, 60, 200])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_rows_hidden_by_short_keys(head_dim, size):
    """With normalisers on both sides of where a row is computed again."""
    call = hidden_by_short_keys(size, head_dim=head_dim)
    rows = exact_rows(call)
    if size > 100:
        assert rows[..., :63].all()
    assert not rows[..., 128:].any()
    check(call)
    call.options["key_mask"] = random_mask(1, 150)
    call.options["key_mask"][:, 63::64] = True
    check(call)


@pytest.mark.parametrize("name", ["heads", "projections", "groups"])
def test_several_heads_each_with_its_own(name):
    sizes = {
        "heads": {"batch": 2, "heads": 3, "key_heads": 3},
        "projections": {"batch": 2, "heads": 4, "key_heads": 2, "num_heads": 2},
        "groups": {"heads": 6, "key_heads": 1, "num_heads": 1},
    }[name]
    call = hidden_by_short_keys(80, **sizes)
    # In one head only, so that the others show whether it leaks.
    quiet = make_call(call.case, 150, "causal", num_features=16, **{"batch": 1, **sizes})
    call.key[:, -1] = quiet.key[:, -1]
    rows = exact_rows(call)
    if rows.shape[1] > 1:
        assert rows[:, 0].any()
        assert not rows[:, -1].any()
    check(call)


@pytest.mark.parametrize("lengths", [[30, 120], [64, 86], [10, 1, 52, 1, 86], [1] * 70 + [80]])
@pytest.mark.parametrize("size", [30, 80])
def test_with_a_past(size, lengths):
    """The past's sums are read at their own scale too, and get their gradient from there."""
    call = hidden_by_short_keys(size)
    check(call, lambda c: stream(c, lengths, "native")[0])


@pytest.mark.parametrize(("size", "count"), [(30, 2), (80, 4)])
def test_in_heads_that_are_cut(size, count):
    """A key at the end of a later part hides rows of that part; earlier parts are its past."""
    call = hidden_by_short_keys(size, 1100, num_features=6, heads=2, head_dim=8)
    call.key[..., 63:900:64, :] = call.key[..., 62:899:64, :]
    with threads(count):
        rows = exact_rows(call)
        assert rows[..., 896:958].all() or size < 80
        check(call)


@pytest.mark.parametrize("size", [20, 60])
def test_small_values_and_small_gradients(size):
    """The loss of a large batch: nothing of it is lost next to a small normaliser."""
    call = hidden_by_short_keys(size)
    expected = call.run("native")
    call.value = call.value * 1e-12
    torch.testing.assert_close(call.run("native") * 1e12, expected, rtol=1e-4, atol=1e-6)
    call.value = call.value * 1e12
    check(call, gradient_size=1e-12)


FACTORS = (1e4, 1e10, 1e18, 1e30, 1e36)


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("name", [*NAMES, "relu", "deterministic-relu"])
def test_a_gigantic_token_in_the_same_chunk(name, which):
    """Up to where float32 overflows: earlier outputs and gradients move by rounding alone."""
    call = causal(name, seed=1)
    before = call.leaves()
    expected = before.run("native")[..., :40, :]
    gradients = torch.autograd.grad(expected.square().sum(), before.inputs)
    for factor in FACTORS:
        after = call.leaves()
        with torch.no_grad():
            getattr(after, which)[..., 40, :] *= factor
        out = after.run("native")
        assert (out[..., :40, :] - expected).abs().max() <= 2e-6
        for a, b in zip(
            torch.autograd.grad(out[..., :40, :].square().sum(), after.inputs),
            gradients,
            strict=True,
        ):
            assert (a - b).abs().max() <= 1e-5
            assert (a[..., 40:, :] == 0).all()
