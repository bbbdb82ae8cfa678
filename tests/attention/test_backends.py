"""The choice of a backend: by name, by context, by default, and under export."""

import contextlib
import re
import threading
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from performers import ListedKeys, SoftmaxFeatures, backends, favor_attention, use_backend
from performers.attention.call import AttentionCall
from tests.attention.cases import BACKENDS, POSITIVE, Call, last_backend, make_call
from tests.features.cases import by_name

# The package has a function of this name.
MODULE = import_module("performers.attention.backends")
NATIVE = pytest.mark.skipif("native" not in BACKENDS, reason="needs the native library")


@pytest.fixture(scope="module")
def call():
    return make_call(POSITIVE, 300, "causal", seed=1)


def used(call):
    call.run()
    return last_backend()


def test_names(call):
    assert isinstance(backends(), tuple)
    assert backends()[-2:] == ("torch", "reference")
    # The bits of their outputs tell them apart.
    outputs = {call.run(name).numpy().tobytes() for name in BACKENDS}
    assert len(outputs) == len(BACKENDS)


def test_the_best_is_the_default(call):
    assert used(call) == backends()[0] != "reference"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_context_chooses(call, name):
    with use_backend(name):
        assert used(call) == name
    assert used(call) == backends()[0]


def test_an_argument_outranks_a_context(call):
    with use_backend("reference"):
        call.run("torch")
        assert used(call) == "reference"


def test_contexts_nest_and_end_with_an_error(call):
    with use_backend("reference"):
        with contextlib.suppress(KeyError), use_backend("torch"):
            assert used(call) == "torch"
            raise KeyError
        assert used(call) == "reference"
    assert used(call) == backends()[0]


def test_an_unknown_backend_is_refused_on_entry(call):
    with pytest.raises(ValueError, match=r"backend must be one of .*'flash'"), use_backend("flash"):
        pytest.fail("the block ran")
    assert used(call) == backends()[0]


@pytest.mark.parametrize("name", ["", "Torch", "native-2"])
def test_names_are_exact(call, name):
    with pytest.raises(ValueError, match="backend must be one of"):
        call.run(name)


def test_threads_do_not_see_each_others_choice(call):
    seen = {}
    inside, leave = threading.Event(), threading.Event()

    def choose():
        with use_backend("reference"):
            inside.set()
            leave.wait(30)
            seen["chooser"] = used(call)

    thread = threading.Thread(target=choose)
    thread.start()
    assert inside.wait(30)
    seen["other"] = used(call)
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


@NATIVE
@pytest.mark.parametrize("by_context", [False, True])
@pytest.mark.parametrize(
    ("call", "what"),
    [
        (make_call(POSITIVE, 10, dtype=torch.float64), "for torch.float64 inputs"),
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
    assert used(call) == "torch"


@NATIVE
@pytest.mark.parametrize(("name", "default", "value"), [("scale", None, 0.2), ("sinks", 0, 2)])
def test_an_argument_that_a_backend_does_not_compute(call, monkeypatch, name, default, value):
    """Refused by its name, and by default left to a backend that does; or to none."""
    declared = {"backends": ("torch",), "otherwise": f"with {name}"}
    monkeypatch.setattr(MODULE, "_COMPUTED_BY", [(name, default, declared)])
    assert used(call) == "native"
    call = Call(call.case, call.feature_map, *call.inputs, {**call.options, name: value})
    with pytest.raises(ValueError, match=f"backend must be 'torch' with {name}, got 'native'"):
        call.run("native")
    assert used(call) == "torch"
    declared["backends"] = ("native",)
    assert used(call) == "native"
    with pytest.raises(ValueError, match=r"no backend covers .*not native for torch.float64.*"):
        call.leaves(torch.float64).run()


@pytest.mark.parametrize(
    ("usable", "reason"),
    [(True, "with listed keys, which the triton"), (False, r"without Triton|capability")],
)
def test_a_call_on_a_gpu_without_the_triton_backend_is_told_once(
    monkeypatch, caplog, usable, reason
):
    monkeypatch.setattr(MODULE.triton, "_told", set())
    monkeypatch.setitem(MODULE._USABLE, "triton", lambda: usable)
    call = make_call(POSITIVE, 4, listed_keys=ListedKeys(16)).to("meta")
    checked = AttentionCall(*call.inputs, call.feature_map, **call.options)
    checked.form = call.feature_map.form()
    checked.query = SimpleNamespace(device=torch.device("cuda"))
    for _ in range(2):
        assert MODULE._best(checked) == "torch"
    assert len(caplog.records) == 1
    assert re.search(reason, caplog.text)


def exported(strict=False, backend=None):
    """Names of the operators of an exported call."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = SoftmaxFeatures(4, 8)

        def forward(self, x):
            return favor_attention(x, x, x, self.features, backend=backend)

    graph = torch.export.export(Attention(), (torch.zeros(1, 2, 8, 4),), strict=strict).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert names
    return names


def has_kernels(names):
    return any(name.startswith("performers.") for name in names)


@NATIVE
@pytest.mark.parametrize("strict", [False, True])
def test_only_onnx_goes_without_the_native_operators(monkeypatch, strict):
    assert strict or has_kernels(exported())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not has_kernels(exported(strict))


@NATIVE
@pytest.mark.parametrize("by_context", [False, True])
def test_native_by_name_is_refused_for_onnx(monkeypatch, by_context):
    context = use_backend("native") if by_context else contextlib.nullcontext()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    message = "'torch' during an ONNX export, got 'native'"
    with context, pytest.raises(ValueError, match=message):
        exported(backend=None if by_context else "native")
