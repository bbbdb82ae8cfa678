"""``torch.compile(fullgraph=True)`` with windows and sinks."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import TESTED, make_call, random_mask
from tests.attention.test_compile import assert_compiled_equals_eager
from tests.attention.test_window_state import FIELDS
from tests.features.cases import by_name


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("bidirectional", {"window": 5, "sinks": 2}),
        ("causal", {"window": 5, "sinks": 2}),
        ("causal", {"sinks": 2}),
        pytest.param("bidirectional", {"window": 70}, marks=pytest.mark.slow),
        pytest.param("causal", {"window": 0}, marks=pytest.mark.slow),
        ("cross", {"sinks": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", TESTED)
def test_forward_and_backward(backend, mode, options):
    call = make_call(by_name("positive"), 130, mode, heads=4, key_heads=2, **options)
    call.options["key_mask"] = random_mask(2, call.key.shape[2])
    assert_compiled_equals_eager(call, "aot_eager", backend)


def test_the_chosen_backend():
    """Without a backend named: the choice itself must not break the graph."""
    call = make_call(by_name("trigonometric"), 70, "causal", window=5, sinks=2)
    assert_compiled_equals_eager(call, "aot_eager", None)


@pytest.mark.parametrize("mode", [pytest.param("bidirectional", marks=pytest.mark.slow), "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_packed(backend, mode):
    offsets = torch.tensor([0, 3, 3, 36, 40])
    call = make_call(by_name("positive"), 40, mode, batch=1, cu_seqlens=offsets)
    call.options |= {"window": 4, "sinks": 2}
    assert_compiled_equals_eager(call, "aot_eager", backend)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options", [{"window": 5, "sinks": 2}, {"window": 70}, {"sinks": 66}], ids=str
)
@pytest.mark.parametrize("backend", TESTED)
def test_with_state(backend, options):
    call = make_call(by_name("positive"), 70, "causal", **options)
    mask = random_mask(2, 70)

    def run(query, key, value, mask, state):
        return favor_attention(
            query,
            key,
            value,
            call.feature_map,
            key_mask=mask,
            state=state,
            return_state=True,
            backend=backend,
            **call.options,
        )

    # Other lengths are other graphs here; symbolic lengths have tests of their own.
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    _, state = run(*call.inputs, mask, None)
    for length in (70, 3, 1):
        rows = [*(x[..., :length, :] for x in call.inputs), mask[:, :length]]
        expected, expected_state = run(*rows, state)
        out, new_state = compiled(*rows, state)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        for name in FIELDS:
            torch.testing.assert_close(getattr(new_state, name), getattr(expected_state, name))


def run_at_lengths(call, backend, lengths, stance):
    """Compile with a symbolic length at the first, and run the others under ``stance``."""

    def run(query, key, value):
        return favor_attention(query, key, value, call.feature_map, backend=backend, **call.options)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, length in enumerate(lengths):
        rows = [x[..., :length, :].clone() for x in call.inputs]
        with torch.compiler.set_stance(stance if count else "default"):
            out = compiled(*rows)
        torch.testing.assert_close(out, run(*rows), rtol=0, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", TESTED)
def test_sinks_compile_once_for_all_lengths(backend):
    call = make_call(by_name("positive"), 260, batch=1, sinks=2)
    run_at_lengths(call, backend, range(70, 260, 18), "fail_on_recompile")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_windows_compile_for_symbolic_lengths(backend, mode):
    """One graph for lengths of one number of chunks; others may compile again, correctly."""
    call = make_call(by_name("positive"), 260, mode, batch=1, window=5, sinks=2)
    run_at_lengths(call, backend, (100, 120, 127), "fail_on_recompile")
    run_at_lengths(call, backend, (100, 128, 250), "default")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_inductor(backend, mode):
    """Compiles C++ for most of a minute each."""
    call = make_call(by_name("positive"), 70, mode, batch=1, window=5, sinks=2)
    assert_compiled_equals_eager(call, "inductor", backend)
