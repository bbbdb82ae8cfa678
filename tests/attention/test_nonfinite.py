"""NaN and infinity: a row that sees one is NaN, and no other row is touched."""

import itertools
import math

import pytest
import torch

from performers import ListedKeys, favor_attention, favor_attention_weights
from tests.attention.cases import BACKENDS, MODES, make_call
from tests.features.cases import by_name, generator

LENGTH = 150
PLACES = (0, 70, 149)
NAMES = ("positive", "data_aware", "trigonometric", "relu", "exp", "tanh", "deterministic-elu+1")
EXACT = [{"window": 20}, {"sinks": 2}, {"window": 20, "sinks": 2}, {"window": LENGTH}]
NUMBERS = (math.nan, math.inf, -math.inf)


def with_number(call, name, place, number, head=1):
    """The call with one entry of one row replaced, in the second row of the batch."""
    inputs = {key: x.clone() for key, x in zip(("query", "key", "value"), call.inputs, strict=True)}
    inputs[name][-1, head, place, 3] = number
    return type(call)(call.case, call.feature_map, **inputs, options=call.options)


def seeing(call, name, place, head=1):
    """Rows ``(batch, heads, L)`` that are to be NaN, pair by pair."""
    batch, heads, length = call.query.shape[:3]
    rows = torch.zeros(batch, heads, length, dtype=torch.bool)
    if name == "query":
        rows[-1, head, place] = True
        return rows
    mask = call.options.get("key_mask")
    if mask is not None and not mask[-1, place]:
        return rows
    seen = torch.ones(length, dtype=torch.bool)
    if call.options.get("is_causal"):
        seen &= torch.arange(length) >= place
    offsets = call.options.get("cu_seqlens")
    if offsets is not None:
        sequence = torch.bucketize(torch.arange(length), offsets[1:], right=True)
        seen &= sequence == sequence[place]
    groups = heads // call.key.shape[1]
    rows[-1, head * groups : (head + 1) * groups] = seen
    return rows


def check(call, backend, names=("query", "key", "value"), places=PLACES, numbers=NUMBERS):
    clean = call.run(backend)
    for name, place in itertools.product(names, places):
        if place >= getattr(call, name).shape[-2]:
            continue
        rows = seeing(call, name, place)
        for number in numbers:
            out = with_number(call, name, place, number).run(backend)
            assert torch.equal(out.isnan().all(-1), rows), (name, place, number)
            torch.testing.assert_close(out[~rows], clean[~rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_map(backend, name, mode):
    check(make_call(by_name(name), LENGTH, mode), backend)


@pytest.mark.parametrize("options", EXACT, ids=str)
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_terms(backend, mode, options):
    check(make_call(by_name("positive"), LENGTH, mode, **options), backend)


@pytest.mark.parametrize("options", [{}, *EXACT[:3]], ids=str)
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend, mode, options):
    """Boundaries inside a chunk: the other sequences of the chunk are not touched."""
    offsets = torch.tensor([0, 40, 72, 130, LENGTH], dtype=torch.int32)
    call = make_call(
        by_name("positive"), LENGTH, mode, batch=1, cu_seqlens=offsets, heads=4, key_heads=2
    )
    call.options.update(options)
    check(call, backend, names=("key", "value"))


@pytest.mark.parametrize("options", [{}, *EXACT[:3]], ids=str)
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_may_hold_anything(backend, mode, options):
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, list(PLACES)] = False
    call = make_call(by_name("positive"), LENGTH, mode, key_mask=mask, **options)
    check(call, backend)


@pytest.mark.parametrize("options", [{}, {"window": 20}], ids=str)
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_listed_keys(backend, mode, options):
    call = make_call(by_name("positive"), LENGTH, mode, **options)
    call.options["listed_keys"] = ListedKeys(16, 4, 8, refresh=16, generator=generator(1))
    check(call, backend, places=(5, 70))


@pytest.mark.parametrize("options", [{}, *EXACT[:3]], ids=str)
@pytest.mark.parametrize("pieces", [[100, 50], [71, 1, 78], [1] * 20 + [130]], ids=str)
@pytest.mark.parametrize("name", ["positive", "relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states(backend, name, pieces, options):
    """What a state has taken in is seen by every later row, also when it leaves the window."""
    if options and name == "relu":
        pytest.skip("exact terms go with softmax features")
    call = make_call(by_name(name), LENGTH, "causal", **options)
    for which, place in itertools.product(("key", "value"), (0, 10, 71)):
        hostile = with_number(call, which, place, math.inf)
        state, outs, start = None, [], 0
        for length in pieces:
            inputs = (x[..., start : start + length, :] for x in hostile.inputs)
            out, state = hostile_step(inputs, call, state, backend)
            outs.append(out)
            start += length
        assert torch.equal(torch.cat(outs, -2).isnan().all(-1), seeing(call, which, place))


def hostile_step(inputs, call, state, backend):
    return favor_attention(
        *inputs, call.feature_map, state=state, return_state=True, backend=backend, **call.options
    )


@pytest.mark.parametrize("options", [{}, *EXACT[:3]], ids=str)
@pytest.mark.parametrize("mode", MODES[:2])
def test_weights(mode, options):
    call = make_call(by_name("positive"), 20, mode, **options)
    for place in (0, 15):
        hostile = with_number(call, "key", place, math.inf)
        weights = favor_attention_weights(
            hostile.query, hostile.key, hostile.feature_map, **hostile.options
        )
        assert torch.equal(weights.isnan().all(-1), seeing(call, "key", place))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, dtype):
    call = make_call(by_name("positive"), LENGTH, "causal", dtype=dtype)
    check(call, backend, numbers=(math.inf,))


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_hide_it(backend, mode, number):
    """The gradient of a NaN is NaN for whatever it was computed from."""
    call = with_number(make_call(by_name("positive"), 70, mode), "key", 40, number).leaves()
    call.run(backend).sum().backward()
    rows = seeing(call, "key", 40)
    assert call.query.grad[rows].isnan().all()
    assert call.query.grad[~rows].isfinite().all()


def test_long_keys_are_not_infinite():
    """A norm that overflows belongs to a key without features, and leaves the others alone."""
    call = make_call(by_name("positive"), LENGTH)
    for backend in BACKENDS:
        assert with_number(call, "key", 7, 1e30).run(backend).isfinite().all()
