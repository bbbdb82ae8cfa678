"""``torch.compile(fullgraph=True)``: no graph break, the values and gradients of eager.

To the compiler a call of the ``native`` backend is one operator.
"""

import pytest
import torch

from performers import PerformerAttention, favor_attention
from tests.attention.cases import (
    BOTH,
    FEW,
    LINEAR,
    LISTED,
    PLAIN,
    POSITIVE,
    SELF,
    Configuration,
    exhaustive,
    law,
    make_call,
    random_mask,
)
from tests.features.cases import by_name, generator

PACKED = Configuration("packed", packed=True)
PACKED_FEW = Configuration("packed, exact keys", window=6, sinks=3, packed=True)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def assert_same(eager, compiled, inputs):
    """Values, memory order and gradients."""
    out, expected = compiled(*inputs), eager(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert out.stride() == expected.stride()
    weight = torch.randn(out.shape, generator=generator(0))
    for a, b in zip(
        torch.autograd.grad(out, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def attend_with(call, backend):
    def attend(query, key, value):
        return favor_attention(query, key, value, call.feature_map, backend=backend, **call.options)

    return attend


def check(call, backend, compiler="aot_eager"):
    """The compiled call, and that the graph has the operators of the backend or none."""
    call, graphs = call.leaves(), []
    eager = attend_with(call, backend)

    def recording(module, inputs):
        graphs.append(module.code)
        return torch._dynamo.lookup_backend(compiler)(module, inputs)

    assert_same(eager, torch.compile(eager, fullgraph=True, backend=recording), call.inputs)
    assert backend is None or ("performers" in graphs[0]) == (backend == "native")


@pytest.mark.parametrize(
    ("name", "mode", "configuration"),
    [
        ("relu", "bidirectional", PLAIN),
        ("positive", "cross", PLAIN),
        exhaustive("positive", "cross", Configuration("sinks", sinks=2)),
        exhaustive("relu", "causal", PLAIN),
        exhaustive("positive", "bidirectional", PLAIN),
        exhaustive("positive", "causal", FEW),
        exhaustive("positive", "causal", PLAIN),
        exhaustive("positive", "bidirectional", FEW),
        exhaustive("positive", "causal", Configuration("sinks", sinks=2)),
        exhaustive("positive", "bidirectional", LISTED),
        exhaustive("positive", "causal", LISTED),
        ("positive", "causal", PACKED_FEW),
        exhaustive("positive", "bidirectional", PACKED),
        slow("positive", "causal", PACKED),
        slow("positive", "bidirectional", PACKED_FEW),
        slow("positive", "bidirectional", BOTH),
        slow("positive", "causal", Configuration("own key", window=0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", LINEAR)
def test_forward_and_backward(backend, name, mode, configuration):
    call = make_call(by_name(name), 70, mode, configuration, heads=4, key_heads=2)
    call.options["key_mask"] = random_mask(*call.key.shape[:3:2])
    # Transposed views, as those of a model, come out in the order that eager gives them.
    call = call.with_inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in call.inputs))
    check(call, backend)


@pytest.mark.parametrize(
    ("name", "mode", "configuration"),
    [
        ("trigonometric", "bidirectional", PLAIN),
        exhaustive("trigonometric", "causal", FEW),
        exhaustive("positive", "bidirectional", PLAIN),
        exhaustive("positive", "causal", PLAIN),
    ],
    ids=str,
)
def test_the_chosen_backend(name, mode, configuration):
    """Without a backend named: the choice itself must not break the graph."""
    check(make_call(by_name(name), 70, mode, configuration), None)


@pytest.mark.parametrize(
    ("configuration", "lengths"),
    [
        (PLAIN, (1,)),
        exhaustive(PLAIN, (70, 1)),
        *(exhaustive(x, (70, 3, 1)) for x in (FEW, Configuration("wide", window=70), BOTH)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", LINEAR)
def test_with_state(backend, configuration, lengths):
    call = make_call(POSITIVE, 70, "causal", configuration)
    mask = random_mask(2, 70)

    def run(query, key, value, mask, state):
        inputs = (query, key, value, call.feature_map)
        more = {"key_mask": mask, "state": state, "return_state": True, "backend": backend}
        return favor_attention(*inputs, **call.options, **more)

    # Other lengths are other graphs here; symbolic lengths have tests of their own.
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    _, state = run(*call.inputs, mask, None)
    for length in lengths:
        inputs = [x[..., :length, :].detach().requires_grad_() for x in call.inputs]
        rows, past = [*inputs, mask[:, :length]], state.detach()
        leaves = [*inputs, past.key_value.requires_grad_(), past.key_sum.requires_grad_()]
        gradients = []
        (out, after), (expected, wanted) = compiled(*rows, past), run(*rows, past)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        for name, x in vars(wanted).items():
            torch.testing.assert_close(getattr(after, name), x)
        for o, s in ((out, after), (expected, wanted)):
            loss = o.square().sum() + s.key_value.square().sum() + s.key_sum.square().sum()
            gradients.append(torch.autograd.grad(loss, leaves))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@law(backends=LINEAR, configurations=[PLAIN, PACKED, FEW], modes=SELF)
def test_inductor(backend, mode, configuration):
    """Compiles C++ for most of a minute each."""
    check(make_call(POSITIVE, 70, mode, configuration, batch=1), backend, "inductor")


@pytest.mark.slow
@law(backends=LINEAR, modes=SELF)
def test_many_blocks(backend, mode):
    """Long enough that the eager path runs block by block."""
    sizes = {"batch": 1, "heads": 4, "num_features": 1024, "head_dim": 8}
    check(make_call(POSITIVE, 1100, mode, **sizes), backend)


@pytest.mark.parametrize("how", ["every size", exhaustive("marked")])
@pytest.mark.parametrize(
    ("mode", "configuration"),
    [
        exhaustive("bidirectional", PLAIN),
        exhaustive("causal", PLAIN),
        exhaustive("bidirectional", Configuration("sinks", sinks=2)),
        slow("bidirectional", FEW),
        slow("causal", FEW),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", LINEAR)
def test_one_graph_for_all_lengths(backend, mode, configuration, how):
    call = make_call(POSITIVE, 300, mode, configuration)
    lengths = (70, 64, 129, 200, 66, 300)
    if backend == "torch" and (mode == "causal" or configuration.window is not None):
        # One graph for lengths of one number of chunks.
        lengths = (100, 120, 127)
    eager = attend_with(call, backend)
    dynamic = True if how == "every size" else None
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for count, length in enumerate(lengths):
        inputs = [x[..., :length, :].clone().requires_grad_() for x in call.inputs]
        for x in inputs if how == "marked" else ():
            torch._dynamo.mark_dynamic(x, 2)
        with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
            assert_same(eager, compiled, inputs)


def test_the_module_when_its_features_are_redrawn():
    """The projection is a tensor of the graph, not a constant in it."""
    attention = PerformerAttention(32, 4, batch_first=True)
    x = torch.randn(2, 20, 32)
    padding = torch.arange(20).expand(2, -1) >= 15
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for options in ({}, {"is_causal": True, "key_padding_mask": padding}):
        before, _ = compiled(x, x, x, **options)
        torch.testing.assert_close(before, attention(x, x, x, **options)[0], rtol=0, atol=1e-5)
        attention.feature_map.redraw_()
        with torch.compiler.set_stance("fail_on_recompile"):
            after, _ = compiled(x, x, x, **options)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, attention(x, x, x, **options)[0], rtol=0, atol=1e-5)
