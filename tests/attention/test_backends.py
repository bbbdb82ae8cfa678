"""Choosing a backend: by name, by context, by default."""

import contextlib
import threading

import pytest
import torch

from performers import backends, use_backend
from tests.attention.cases import BACKENDS, TESTED, make_call
from tests.features.cases import by_name


@pytest.fixture(scope="module")
def call():
    return make_call(by_name("positive"), 300, "causal", seed=1)


@pytest.fixture(scope="module")
def signatures(call):
    """The bits of each backend's output tell the backends apart."""
    outputs = {name: call.run(name) for name in BACKENDS}
    assert len({x.numpy().tobytes() for x in outputs.values()}) == len(BACKENDS)
    return outputs


def used(call, signatures):
    out = call.run()
    return next(name for name, x in signatures.items() if torch.equal(x, out))


def test_names():
    assert "reference" in backends()
    assert "torch" in backends()
    assert isinstance(backends(), tuple)
    assert backends()[-1] == "reference"
    assert TESTED


def test_the_best_is_the_default(call, signatures):
    assert used(call, signatures) == backends()[0] != "reference"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_context_chooses(call, signatures, name):
    with use_backend(name):
        assert used(call, signatures) == name
    assert used(call, signatures) == backends()[0]


def test_an_argument_outranks_a_context(call, signatures):
    with use_backend("reference"):
        assert torch.equal(call.run("torch"), signatures["torch"])
        assert used(call, signatures) == "reference"


def test_contexts_nest(call, signatures):
    with use_backend("reference"):
        with use_backend("torch"):
            assert used(call, signatures) == "torch"
        assert used(call, signatures) == "reference"


def test_the_choice_is_restored_after_an_error(call, signatures):
    with contextlib.suppress(KeyError), use_backend("reference"):
        raise KeyError
    assert used(call, signatures) == backends()[0]
    with use_backend("reference"):
        with contextlib.suppress(KeyError), use_backend("torch"):
            raise KeyError
        assert used(call, signatures) == "reference"


def test_an_unknown_backend_is_refused_on_entry(call, signatures):
    with pytest.raises(ValueError, match=r"backend must be one of .*'flash'"), use_backend("flash"):
        pytest.fail("the block ran")
    assert used(call, signatures) == backends()[0]


@pytest.mark.parametrize("name", ["", "Torch", "native-2"])
def test_names_are_exact(call, name):
    with pytest.raises(ValueError, match="backend must be one of"):
        call.run(name)


def test_threads_do_not_see_each_others_choice(call, signatures):
    seen = {}
    inside, leave = threading.Event(), threading.Event()

    def choose():
        with use_backend("reference"):
            inside.set()
            leave.wait(30)
            seen["chooser"] = used(call, signatures)

    thread = threading.Thread(target=choose)
    thread.start()
    assert inside.wait(30)
    seen["other"] = used(call, signatures)
    leave.set()
    thread.join()
    assert seen == {"chooser": "reference", "other": backends()[0]}


@pytest.mark.parametrize("name", BACKENDS)
def test_backward_outside_the_context(call, name):
    """The backward pass belongs to the backend that ran forward."""
    fresh = call.leaves()
    with use_backend(name):
        out = fresh.run()
    inside = torch.autograd.grad(out.sum(), fresh.inputs)
    again = torch.autograd.grad(fresh.run(name).sum(), fresh.inputs)
    assert all(torch.equal(a, b) for a, b in zip(inside, again, strict=True))


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the native library")
@pytest.mark.parametrize("by_context", [False, True])
@pytest.mark.parametrize(
    ("call", "what"),
    [
        (make_call(by_name("positive"), 10, dtype=torch.float64), "for torch.float64 inputs"),
        (make_call(by_name("trigonometric"), 10), "for trigonometric features"),
        (make_call(by_name("tanh"), 10), "for elementwise features of other functions than relu"),
        (make_call(by_name("exp"), 10), "for exponential features with an epsilon"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_named_backend_that_does_not_cover_the_call_is_refused(call, what, by_context):
    message = f"'torch' {what}.*, got 'native', which does not cover it; pass backend=None"
    context = use_backend("native") if by_context else contextlib.nullcontext()
    with context, pytest.raises(ValueError, match=message):
        call.run(None if by_context else "native")
    assert torch.equal(call.run(), call.run("torch"))
