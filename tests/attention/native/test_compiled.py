"""To ``torch.compile`` a call is one operator: one graph for all lengths, layouts kept."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import make_call
from tests.attention.native.support import NATIVE
from tests.features.cases import by_name, generator

pytestmark = NATIVE

LENGTHS = (70, 64, 129, 200, 66, 300)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def attend_with(call):
    def attend(query, key, value, state=None):
        more = {} if state is None else {"state": state, "return_state": True}
        return favor_attention(
            query, key, value, call.feature_map, backend="native", **call.options, **more
        )

    return attend


def assert_same(eager, compiled, inputs):
    """Values and gradients to the bit, and the memory order."""
    out, expected = compiled(*inputs), eager(*inputs)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    weight = torch.randn(out.shape, generator=generator(0))
    gradients = torch.autograd.grad(out, inputs, weight)
    wanted = torch.autograd.grad(expected, inputs, weight)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def in_model_order(x):
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["every size", "marked"])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_one_graph_for_all_lengths(mode, how):
    calls = [
        make_call(by_name("positive"), n, mode, heads=4, key_heads=2).leaves() for n in LENGTHS
    ]
    eager = attend_with(calls[0])
    dynamic = True if how == "every size" else None
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for i, call in enumerate(call.leaves() for call in calls):
        if how == "marked":
            for x in call.inputs:
                torch._dynamo.mark_dynamic(x, 2)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            call.feature_map = calls[0].feature_map
            assert_same(eager, compiled, call.inputs)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_memory_order(mode):
    """Transposed views of a model come out as eager gives them."""
    call = make_call(by_name("positive"), 70, mode, heads=4, key_heads=2)
    eager = attend_with(call)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_same(eager, compiled, [in_model_order(x) for x in call.inputs])


def test_one_graph_for_all_steps_and_gradients_through_the_state():
    call = make_call(by_name("positive"), 40, "causal")
    eager = attend_with(call)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)
    _, state = call.run("native", return_state=True)
    for length in (20, 33):
        call = make_call(by_name("positive"), length, "causal", seed=length).leaves()
        past = state.clone()
        leaves = [*call.inputs, past.key_value.requires_grad_(), past.key_sum.requires_grad_()]
        (out, after), (expected, wanted) = compiled(*call.inputs, past), eager(*call.inputs, past)
        assert torch.equal(out, expected)
        losses = [
            o.square().sum() + s.key_value.square().sum() + s.key_sum.square().sum()
            for o, s in ((out, after), (expected, wanted))
        ]
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in losses), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_inductor_with_any_length(mode):
    """Compiles C++ for the elementwise code around the operator."""
    calls = [make_call(by_name("positive"), n, mode) for n in (70, 130)]
    attend = attend_with(calls[0])

    def layer(query, key, value):
        return attend(query * 0.5, key + 1, value.sin()).transpose(1, 2).flatten(2).cos()

    compiled = torch.compile(layer, fullgraph=True, backend="inductor", dynamic=True)
    for call in calls:
        call = call.leaves()
        out, expected = compiled(*call.inputs), layer(*call.inputs)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        weight = torch.randn(out.shape, generator=generator(0))
        for a, b in zip(
            torch.autograd.grad(out, call.inputs, weight),
            torch.autograd.grad(expected, call.inputs, weight),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
