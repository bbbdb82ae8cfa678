"""NaN and infinity: a row that sees one is NaN, and no other row is touched."""

import itertools
import math

import pytest
import torch

from performers import favor_attention_weights
from tests.attention.cases import (
    BACKENDS,
    CONFIGURATIONS,
    POSITIVE,
    SELF,
    STREAMED,
    Configuration,
    assert_close_rows,
    law,
    make_call,
    stream,
)

LENGTH = 150
NAMES = ("query", "key", "value")
PLACES = (0, 70, 149)
WHOLE = Configuration("a window over everything", window=LENGTH)
NUMBERS = (math.nan, math.inf, -math.inf)


def with_number(call, name, place, number, head=1):
    """The call with one entry of one row replaced, in the second row of the batch."""
    changed = call.with_inputs(*(x.clone() for x in call.inputs))
    getattr(changed, name)[-1, head, place, 3] = number
    return changed


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


def check(call, backend, numbers=NUMBERS):
    clean, (_, conditioning) = call.run(backend), call.expected()
    for (i, name), (j, place) in itertools.product(enumerate(NAMES), enumerate(PLACES)):
        if place >= getattr(call, name).shape[-2]:
            continue
        # Each number in each tensor and at each place.
        rows, number = seeing(call, name, place), numbers[(i + j) % len(numbers)]
        out = with_number(call, name, place, number).run(backend).cpu()
        assert torch.equal(out.isnan().all(-1), rows), (name, place, number)
        assert_close_rows(out[~rows], clean.cpu()[~rows], conditioning[~rows], 1e-5)


@law(configurations=[*CONFIGURATIONS, WHOLE])
def test_only_rows_that_see_one_are_nan(backend, case, configuration, mode, device):
    """Masked keys hold some, and packed boundaries lie inside of chunks."""
    check(make_call(case, LENGTH, mode, configuration, device=device), backend)


@pytest.mark.parametrize("pieces", [[100, 50], [71, 1, 78], [1] * 20 + [130]], ids=str)
@law(configurations=STREAMED)
def test_states(backend, case, configuration, pieces):
    """What a state has taken in is seen by every later row, also when it leaves the window."""
    call = make_call(case, LENGTH, "causal", configuration)
    for which, place in (("key", 0), ("value", 10), ("key", 71)):
        out, _ = stream(with_number(call, which, place, math.inf), pieces, backend)
        assert torch.equal(out.isnan().all(-1), seeing(call, which, place))


@law(configurations=[x for x in CONFIGURATIONS if not x.packed], modes=SELF)
def test_weights(configuration, mode):
    call = make_call(POSITIVE, 20, mode, configuration)
    for place in (0, 15):
        hostile = with_number(call, "key", place, math.inf)
        weights = favor_attention_weights(
            hostile.query, hostile.key, hostile.feature_map, **hostile.options
        )
        assert torch.equal(weights.isnan().all(-1), seeing(call, "key", place))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, dtype):
    call = make_call(POSITIVE, LENGTH, "causal", dtype=dtype)
    check(call, backend, numbers=(math.inf,))


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@law(modes=SELF)
def test_gradients_do_not_hide_it(backend, mode, number):
    """The gradient of a NaN is NaN for whatever it was computed from."""
    call = with_number(make_call(POSITIVE, 70, mode), "key", 40, number).leaves()
    call.run(backend).sum().backward()
    rows = seeing(call, "key", 40)
    assert call.query.grad[rows].isnan().all()
    assert call.query.grad[~rows].isfinite().all()


def test_long_keys_are_not_infinite():
    """A norm that overflows belongs to a key without features, and leaves the others alone."""
    call = make_call(POSITIVE, LENGTH)
    for backend in BACKENDS:
        assert with_number(call, "key", 7, 1e30).run(backend).isfinite().all()
