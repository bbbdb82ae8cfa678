"""Calls that the backend takes, and its operators as torch sees them."""

import pytest
import torch

import performers
from performers import ListedKeys, favor_attention
from performers.attention.operators import Inputs
from performers.attention.triton import backend
from performers.attention.triton.operators import triton_forward
from tests.attention.cases import make_call, trained
from tests.attention.triton.support import small_call
from tests.features.cases import by_name


def test_it_is_listed_after_the_kernels_of_the_cpu():
    names = performers.backends()
    assert "triton" in names
    assert names.index("triton") < names.index("torch")


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (make_call(by_name("positive"), 10, dtype=torch.float64), "for torch.float64 inputs"),
        (small_call(10, listed_keys=ListedKeys(24)), "with listed keys"),
        (trained(make_call(by_name("positive"), 10)), "for features whose projection is trained"),
        (
            make_call(by_name("data_aware"), 5, head_dim=72, dtype=torch.bfloat16),
            "for torch.float32 inputs with a",
        ),
        (make_call(by_name("trigonometric"), 10), "for trigonometric features"),
        (make_call(by_name("gelu"), 10), "for elementwise features of another function than relu"),
        (
            make_call(by_name("positive"), 5, head_dim=72),
            "for torch.float32 inputs with a",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_call_it_does_not_cover_is_refused(call, what):
    with pytest.raises(ValueError, match=f"{what}.*, got 'triton', which does not cover it"):
        call.run("triton")


def test_a_projection_that_is_trained_needs_no_other_backend_without_gradients():
    call = trained(small_call(20))
    with torch.no_grad():
        out = call.run("triton")
    assert (out - call.run("torch")).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_balanced_features_of_16_bit_inputs(dtype):
    """Balanced inputs are float32, and so is the computation."""
    call = small_call(70, "causal", name="data_aware", dtype=dtype).leaves()
    found = []
    for name in ("triton", "torch"):
        out = call.run(name)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), call.inputs)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= torch.finfo(dtype).eps * b.abs().max()


def test_fullgraph():
    """To the compiler a call is one operator, forward and backward."""
    call = small_call(70).leaves()

    def step(query, key, value):
        return favor_attention(query, key, value, call.feature_map, backend="triton").square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*call.inputs), step(*call.inputs)
    assert torch.equal(out, expected)
    grads, wanted = (torch.autograd.grad(x.sum(), call.inputs) for x in (out, expected))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_no_second_derivative():
    call = small_call(20).leaves()
    (grad,) = torch.autograd.grad(call.run("triton").sum(), call.query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), call.key)


def test_operators_are_well_formed():
    inputs = Inputs.of(small_call(10, window=3, sinks=2).checked())
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    torch.library.opcheck(triton_forward, (*leaves, *inputs[3:]))


def test_autocast():
    call = small_call(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call.run("triton")
    assert out.dtype == torch.bfloat16
    assert (out - call.run("triton")).abs().max() < 2e-2


def test_calls_it_does_not_cover_are_told_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_told", set())
    checked = make_call(by_name("trigonometric"), 10).checked()
    for _ in range(2):
        backend.tell_unused(backend.uncovered(checked))
        backend.tell_unused(None)
    assert len(caplog.records) == 2
    assert "the torch backend runs calls on a GPU for trigonometric features, which" in caplog.text
