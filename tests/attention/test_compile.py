"""``torch.compile(fullgraph=True)``: no graph break, the values and gradients of eager."""

import pytest
import torch

from performers import PerformerAttention, favor_attention
from tests.attention.cases import MODES, TESTED, make_call, random_mask
from tests.features.cases import by_name


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiled_equals_eager(call, compiler, backend):
    call = call.leaves()

    def run(query, key, value):
        return favor_attention(query, key, value, call.feature_map, backend=backend, **call.options)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    expected, out = run(*call.inputs), compiled(*call.inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, call.inputs, weight),
        torch.autograd.grad(expected, call.inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "mode"), [*(("positive", mode) for mode in MODES), ("relu", "causal")]
)
@pytest.mark.parametrize("backend", TESTED)
def test_forward_and_backward(backend, name, mode):
    call = make_call(by_name(name), 70, mode, heads=4, key_heads=2)
    call.options["key_mask"] = random_mask(2, call.key.shape[2])
    assert_compiled_equals_eager(call, "aot_eager", backend)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_the_chosen_backend(mode):
    """Without a backend named: the choice itself must not break the graph."""
    call = make_call(by_name("positive"), 70, mode)
    assert_compiled_equals_eager(call, "aot_eager", None)


@pytest.mark.parametrize("mode", ["bidirectional", pytest.param("causal", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", TESTED)
def test_packed(backend, mode):
    call = make_call(
        by_name("positive"), 40, mode, batch=1, cu_seqlens=torch.tensor([0, 3, 3, 36, 40])
    )
    assert_compiled_equals_eager(call, "aot_eager", backend)


@pytest.mark.parametrize("backend", TESTED)
def test_with_state(backend):
    call = make_call(by_name("positive"), 70, "causal")

    def run(query, key, value, state):
        return favor_attention(
            query,
            key,
            value,
            call.feature_map,
            is_causal=True,
            state=state,
            return_state=True,
            backend=backend,
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    _, state = run(*call.inputs, None)
    for length in (70, 1):
        rows = [x[..., :length, :] for x in call.inputs]
        expected, expected_state = run(*rows, state)
        out, new_state = compiled(*rows, state)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        for name in ("key_value", "key_sum", "log_scale"):
            torch.testing.assert_close(getattr(new_state, name), getattr(expected_state, name))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_many_blocks(backend, mode):
    """Long enough that the eager path runs block by block."""
    call = make_call(
        by_name("positive"), 1100, mode, batch=1, heads=4, num_features=1024, head_dim=8
    )
    assert_compiled_equals_eager(call, "aot_eager", backend)


def test_the_module():
    attention = PerformerAttention(32, 4, batch_first=True)
    x = torch.randn(2, 20, 32)
    padding = torch.arange(20).expand(2, -1) >= 15
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for options in ({}, {"is_causal": True}, {"key_padding_mask": padding}):
        expected, _ = attention(x, x, x, **options)
        out, _ = compiled(x, x, x, **options)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_redrawing_does_not_recompile_or_go_stale():
    """The projection is a tensor of the graph, not a constant in it."""
    attention = PerformerAttention(16, 2, batch_first=True)
    x = torch.randn(1, 20, 16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    before = compiled(x, x, x)[0]
    attention.feature_map.redraw_()
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x, x, x)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, attention(x, x, x)[0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_inductor(backend, mode, packed):
    """Compiles C++ for most of a minute each."""
    options = {"cu_seqlens": torch.tensor([0, 3, 3, 66, 70])} if packed else {}
    call = make_call(by_name("positive"), 70, mode, batch=1, **options)
    assert_compiled_equals_eager(call, "inductor", backend)
