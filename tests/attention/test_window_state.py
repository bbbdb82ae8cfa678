"""With exact terms: full sequence = chunks resumed with a state = one step at a time."""

import pytest
import torch

from performers import favor_attention
from tests.attention import oracle
from tests.attention.cases import (
    BACKENDS,
    EXACT,
    FEW_EXACT,
    TESTED,
    WIDE,
    assert_close_gradients,
    assert_close_rows,
    covers,
    make_call,
    random_mask,
    stream,
    upstream,
)
from tests.attention.test_state import assert_same_state
from tests.features.cases import by_name

LENGTH = 172
SPLITS = {
    "whole": [172],
    "odd": [1, 7, 64, 100],
    "even": [100, 64, 7, 1],
    "short": [3] * 57 + [1],
    "empty": [0, 70, 0, 102, 0],
    "steps": [1] * LENGTH,
    "prompt": [130] + [1] * 42,
}
EXACT_TERMS = [(0, 0), (5, 0), (None, 3), (5, 3), (64, 4), (70, 66), (400, 0), (None, 400)]
FIELDS = (
    "key_value",
    "key_sum",
    "log_scale",
    "recent_key",
    "recent_value",
    "recent_mask",
    "sink_key",
    "sink_value",
    "sink_mask",
)


def make_mask(kind):
    """None, or a mask of two rows whose first keys are at different places."""
    if kind == "unmasked":
        return None
    mask = random_mask(2, LENGTH, seed=1, share=0.6)
    mask[1] = torch.arange(LENGTH) >= 90
    if kind == "holes":
        mask[0, 20:90] = False
        mask[1, 95:165] = False
    else:
        mask[0] = torch.arange(LENGTH) >= 3
    return mask


def assert_same_exact_terms(first, second):
    """The same keys and values kept; what a slot without a key holds does not matter."""
    for kind in ("recent", "sink"):
        masks = [getattr(state, f"{kind}_mask") for state in (first, second)]
        if masks[0] is None or masks[1] is None:
            assert masks[0] is masks[1] is None
            continue
        assert torch.equal(*masks)
        for what in ("key", "value"):
            kept = [
                getattr(state, f"{kind}_{what}").where(masks[0][:, None, :, None], 0.0)
                for state in (first, second)
            ]
            assert torch.equal(*kept)


@pytest.mark.parametrize("masking", ["unmasked", "left", "holes"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("window", "sinks"), EXACT_TERMS)
@pytest.mark.parametrize("backend", TESTED)
def test_pieces_equal_the_whole(backend, window, sinks, split, masking):
    call = make_call(by_name("positive"), LENGTH, "causal", seed=1, window=window, sinks=sinks)
    mask = make_mask(masking)
    if mask is not None:
        call.options["key_mask"] = mask
    expected, conditioning = call.expected()
    with torch.no_grad():
        out, state = stream(call, SPLITS[split], backend)
        whole, whole_state = call.run(backend, return_state=True)
    assert_close_rows(out, expected, conditioning, 2e-5)
    assert_close_rows(whole, expected, conditioning, 2e-5)
    assert_same_state(state, whole_state)
    assert_same_exact_terms(state, whole_state)


@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_map(backend, case):
    call = make_call(case, 60, "causal", seed=2, window=9, sinks=3)
    call.options["key_mask"] = random_mask(2, 60, seed=2)
    expected, conditioning = call.expected()
    out, _ = stream(call, [7, 30, 1, 1, 21], backend)
    assert_close_rows(out, expected, conditioning, 2e-5)


@pytest.mark.parametrize("split", ["odd", "empty", "prompt"])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 3), (None, 3), (70, 66)])
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_flow_through_the_state(backend, window, sinks, split):
    """To the sums, to the last keys and values and to the sinks."""
    call = make_call(
        by_name("positive"),
        LENGTH,
        "causal",
        heads=4,
        key_heads=2,
        seed=2,
        window=window,
        sinks=sinks,
        key_mask=make_mask("holes"),
    )
    ours, dense = call.leaves(), call.leaves(torch.float64)
    expected, conditioning = dense.expected()
    out, _ = stream(ours, SPLITS[split], backend)
    weighting = upstream(expected, conditioning)
    assert_close_gradients(
        torch.autograd.grad(out, ours.inputs, weighting.float()),
        torch.autograd.grad(expected, dense.inputs, weighting),
    )


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 3), (None, 3), (50, 0)])
def test_the_reference_resumes_too(window, sinks):
    for case in FEW_EXACT:
        call = make_call(case, 40, "causal", seed=3, window=window, sinks=sinks)
        call.options["key_mask"] = random_mask(2, 40, seed=3)
        ours, dense = call.leaves(), call.leaves(torch.float64)
        expected, conditioning = dense.expected()
        out, state = stream(ours, [1, 15, 1, 23], "reference")
        assert_close_rows(out.detach(), expected.detach(), conditioning, 2e-5)
        weighting = upstream(expected, conditioning)
        assert_close_gradients(
            torch.autograd.grad(out, ours.inputs, weighting.float()),
            torch.autograd.grad(expected, dense.inputs, weighting),
        )
        for backend in [name for name in TESTED if covers(name, case)]:
            _, other = call.run(backend, return_state=True)
            assert_same_state(state, other)
            assert_same_exact_terms(state, other)


@pytest.mark.parametrize(("window", "sinks"), [(5, 3), (30, 0), (None, 25)])
@pytest.mark.parametrize("backend", TESTED)
def test_backends_read_each_others_states(backend, window, sinks):
    call = make_call(by_name("positive"), 40, "causal", seed=4, window=window, sinks=sinks)
    expected, conditioning = call.expected()
    for first, second in ((backend, "reference"), ("reference", backend)):
        halves = list(zip(*(x.split(20, dim=-2) for x in call.inputs), strict=True))
        _, state = favor_attention(
            *halves[0], call.feature_map, return_state=True, backend=first, **call.options
        )
        out = favor_attention(
            *halves[1], call.feature_map, state=state, backend=second, **call.options
        )
        assert_close_rows(out, expected[..., 20:, :], conditioning[..., 20:, :], 2e-5)


@pytest.mark.parametrize("num_heads", [None, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_and_shapes(backend, num_heads):
    call = make_call(
        by_name("positive"),
        80,
        "causal",
        heads=4,
        key_heads=2,
        num_heads=num_heads,
        seed=5,
        window=6,
        sinks=3,
    )
    expected, conditioning = call.expected()
    out, state = stream(call, [30, 1, 49], backend)
    assert_close_rows(out, expected, conditioning, 2e-5)
    heads = 4 if num_heads == 4 else 2
    assert state.key_value.shape == (2, heads, 48, 8)
    assert state.recent_key.shape == (2, heads, 6, 16)
    assert state.recent_value.shape == (2, heads, 6, 8)
    assert state.recent_mask.shape == (2, 6)
    assert state.sink_key.shape == (2, heads, 3, 16)
    assert state.sink_value.shape == (2, heads, 3, 8)
    assert state.sink_mask.shape == (2, 3)
    assert state.recent_mask.dtype == state.sink_mask.dtype == torch.bool
    assert state.recent_mask.all()
    assert state.sink_mask.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_of_other_dtypes(backend, dtype):
    call = make_call(by_name("positive"), 90, "causal", dtype=dtype, window=20, sinks=2)
    expected, conditioning = call.expected()
    out, _ = stream(call, [7, 1, 40, 42], backend)
    rounding = torch.finfo(dtype).eps * expected.abs()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert ((out.double() - expected).abs() <= rounding + tolerance * conditioning).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    call = make_call(by_name("positive"), 70, "causal", window=9, sinks=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = stream(call, [40, 1, 29], backend)
    assert state.key_value.dtype == torch.float32
    plain, _ = stream(call, [40, 1, 29], backend)
    assert torch.equal(out, plain.bfloat16())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("split", ["odd", "short"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_masked_tokens_hold_does_not_matter_to_later_calls(backend, split, poison):
    results = []
    for fill in (1.0, poison):
        call = make_call(by_name("positive"), LENGTH, "causal", seed=6, window=5, sinks=3)
        mask = call.options["key_mask"] = make_mask("holes")
        hidden = ~mask[:, None, :, None]
        call.key = call.key.masked_fill(hidden, fill)
        call.value = call.value.masked_fill(hidden, fill)
        call = call.leaves()
        out, _ = stream(call, SPLITS[split], backend)
        results.append((out, *torch.autograd.grad(out.sum(), call.inputs)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (64, 0), (None, 40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_has_seen_nothing(backend, window, sinks):
    """A first chunk of masked tokens: zeros, and the next chunk is as if it were the first."""
    call = make_call(by_name("positive"), 70, "causal", window=window, sinks=sinks, seed=9)
    none = torch.zeros(2, 70, dtype=torch.bool)
    out, state = call.run(backend, key_mask=none, return_state=True)
    assert (out == 0).all()
    plain, plain_state = call.run(backend, return_state=True)
    empty = make_call(by_name("positive"), 0, "causal", window=window, sinks=sinks)
    _, empty_state = empty.run(return_state=True)
    for before in (state, empty_state):
        resumed, resumed_state = call.run(backend, state=before, return_state=True)
        torch.testing.assert_close(resumed, plain, rtol=0, atol=2e-6)
        assert_same_state(resumed_state, plain_state)
        assert_same_exact_terms(resumed_state, plain_state)


@pytest.mark.parametrize("backend", WIDE)
def test_an_empty_call_hands_the_state_on(backend):
    call = make_call(by_name("positive"), 70, "causal", window=6, sinks=2)
    empty = make_call(by_name("positive"), 0, "causal", window=6, sinks=2)
    _, state = call.run(backend, return_state=True)
    out, after = empty.run(backend, state=state, return_state=True)
    assert out.shape == (2, 2, 0, 8)
    assert_same_state(after, state)
    assert_same_exact_terms(after, state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_longer_than_its_window(backend):
    """Fifteen windows of single steps: keys leave the window for the sums and are not lost."""
    call = make_call(by_name("positive"), 320, "causal", batch=1, window=20, sinks=2, seed=7)
    call.key = call.key * torch.linspace(0, 12.6, 320).sin().abs()[:, None] * 2
    expected, conditioning = call.expected()
    with torch.no_grad():
        out, _ = stream(call, [1] * 320, backend)
    assert_close_rows(out, expected, conditioning, 1e-4)


@pytest.mark.parametrize("backend", TESTED)
def test_a_long_prompt_and_a_few_steps(backend):
    call = make_call(by_name("positive"), 903, "causal", batch=1, window=64, sinks=4, seed=8)
    expected, conditioning = call.expected()
    out, _ = stream(call, [900, 1, 1, 1], backend)
    assert_close_rows(out, expected, conditioning, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reordered_streams(backend):
    """As beam search does it, exact terms included."""
    call = make_call(by_name("positive"), 60, "causal", batch=3, seed=6, window=9, sinks=3)
    call.options["key_mask"] = random_mask(3, 60, seed=6)
    index = torch.tensor([2, 0, 0, 1])
    _, state = call.run(backend, return_state=True)
    assert state.reorder_(index) is state
    later = make_call(by_name("positive"), 20, "causal", batch=4, seed=7)
    out = favor_attention(
        *later.inputs,
        call.feature_map,
        is_causal=True,
        window=9,
        sinks=3,
        state=state,
        backend=backend,
    )
    joined = [
        torch.cat((x[index], y), dim=-2) for x, y in zip(call.inputs, later.inputs, strict=True)
    ]
    mask = torch.cat((call.options["key_mask"][index], torch.ones(4, 20, dtype=torch.bool)), dim=1)
    expected, conditioning = oracle.attend(
        call.case, call.feature_map, *joined, is_causal=True, key_mask=mask, window=9, sinks=3
    )
    assert_close_rows(out, expected[..., 60:, :], conditioning[..., 60:, :], 2e-5)
