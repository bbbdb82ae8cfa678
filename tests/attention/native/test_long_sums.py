"""Two hundred thousand keys: float32 sums stay close to those in float64."""

import pytest
import torch

from tests.attention.cases import make_call, random_mask
from tests.attention.native.support import NATIVE, threads
from tests.features.cases import by_name

pytestmark = NATIVE

LENGTH = 200_000


def long_call(name, mode):
    sizes = {"batch": 1, "heads": 1, "head_dim": 8, "value_dim": 4, "num_features": 16}
    return make_call(by_name(name), LENGTH, mode, **sizes)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_values_with_a_mean(name, mode, count):
    """Sums that grow, of values that do not average out."""
    call = long_call(name, mode)
    call.value = call.value + 3
    call.options["key_mask"] = random_mask(1, LENGTH, share=0.9)
    expected = call.leaves(torch.float64).run("torch").detach()
    with threads(count):
        out = call.run("native")
    assert (out - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_averages_of_one(name, mode):
    """Numerator and normaliser are summed equally well."""
    call = long_call(name, mode)
    call.value = torch.ones_like(call.value)
    assert (call.run("native") - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_gradients(mode):
    call = make_call(
        by_name("positive"),
        LENGTH,
        mode,
        batch=1,
        heads=1,
        head_dim=8,
        value_dim=4,
        num_features=16,
    )
    ours, dense = call.leaves(), call.leaves(torch.float64)
    got = torch.autograd.grad((ours.run("native") - 1).square().sum(), ours.inputs)
    wanted = torch.autograd.grad((dense.run("torch") - 1).square().sum(), dense.inputs)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
