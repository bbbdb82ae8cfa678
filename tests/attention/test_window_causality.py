"""With windows and sinks too, nothing later moves an earlier output or its gradient."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import BACKENDS, EXACT, TESTED, make_call, stream
from tests.features.cases import by_name

LENGTH = 140
FACTORS = (1e4, 250.0, 0.0)
EXACT_TERMS = ({"window": 5}, {"window": 0, "sinks": 2}, {"window": 70, "sinks": 3}, {"sinks": 4})


def changed(call, where, factor):
    """The same call with query, key and value multiplied by ``factor`` at some positions."""
    inputs = (torch.where(where[:, None], x * factor, x) for x in call.inputs)
    return type(call)(call.case, call.feature_map, *inputs, call.options)


def assert_unmoved(before, after, conditioning):
    """By 2e-6, times what a normaliser near zero makes of rounding."""
    assert torch.isfinite(after).all()
    size = conditioning * (1 + before.abs().amax(-1, keepdim=True))
    bound = 2e-6 * torch.where(conditioning > 1 + 1e-9, size, torch.ones_like(size))
    assert ((before - after).abs() <= bound).all(), (before - after).abs().max()


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_later_tokens_do_not_matter(backend, case, options):
    """Positions at both ends of chunks, inside and beyond a window from the rows that look."""
    for position in (1, 3, 63, 64, 66, 100, 128, 139):
        call = make_call(case, LENGTH, "causal", batch=1, seed=position, **options)
        before, (_, conditioning) = call.run(backend), call.expected()
        rows = slice(0, position)
        for factor in FACTORS:
            after = changed(call, torch.arange(LENGTH) >= position, factor).run(backend)
            assert torch.isfinite(after).all()
            assert_unmoved(before[..., rows, :], after[..., rows, :], conditioning[..., rows, :])


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
def test_later_tokens_do_not_matter_to_the_reference(options):
    call = make_call(by_name("positive"), LENGTH, "causal", batch=1, **options)
    before, (_, conditioning) = call.run("reference"), call.expected()
    for position in (2, 64, 100):
        for factor in FACTORS:
            after = changed(call, torch.arange(LENGTH) >= position, factor).run("reference")
            rows = slice(0, position)
            assert_unmoved(before[..., rows, :], after[..., rows, :], conditioning[..., rows, :])


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hostile_token_alone_does_not_matter(backend, options):
    call = make_call(by_name("positive"), LENGTH, "causal", batch=1, **options)
    before = call.run(backend)
    for position in (1, 64, 90):
        for which in ("query", "key", "value"):
            for factor in FACTORS:
                hostile = changed(call, torch.zeros(LENGTH, dtype=torch.bool), 1.0)
                x = getattr(hostile, which).clone()
                x[..., position, :] *= factor
                setattr(hostile, which, x)
                after = hostile.run(backend)
                assert (before - after)[..., :position, :].abs().max() <= 2e-6


@pytest.mark.parametrize("factor", [1.0, 250.0])
@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_of_earlier_outputs_stop_at_later_tokens(backend, options, factor):
    for position in (1, 64, 65, 100):
        call = make_call(by_name("positive"), LENGTH, "causal", batch=1, seed=position, **options)
        call = changed(call, torch.arange(LENGTH) >= position, factor).leaves()
        call.run(backend)[..., :position, :].square().sum().backward()
        for x in call.inputs:
            assert (x.grad[..., position:, :] == 0).all()
            assert torch.isfinite(x.grad).all()
        assert (call.value.grad[..., :position, :] != 0).any()


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_packed_sequences_do_not_see_each_other(backend, mode, options):
    """A window that reaches over a boundary, and sinks, belong to one sequence."""
    offsets = torch.tensor([0, 1, 40, 40, 64, 129, LENGTH], dtype=torch.int32)
    call = make_call(by_name("positive"), LENGTH, mode, batch=1, cu_seqlens=offsets, **options)
    before = call.run(backend)
    index = torch.arange(LENGTH)
    for start, stop in ((1, 40), (64, 129)):
        for factor in FACTORS:
            after = changed(call, (index < start) | (index >= stop), factor).run(backend)
            assert (before - after)[..., start:stop, :].abs().max() <= 2e-6
        leaves = call.leaves()
        leaves.run(backend)[..., start:stop, :].square().sum().backward()
        for x in leaves.inputs:
            assert (x.grad[..., :start, :] == 0).all()
            assert (x.grad[..., stop:, :] == 0).all()
        assert (leaves.value.grad[..., start:stop, :] != 0).any()


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_a_stream_is_as_causal_as_one_call(backend, options):
    call = make_call(by_name("positive"), LENGTH, "causal", batch=1, **options)
    before, _ = stream(call, [70, 70], backend)
    for factor in FACTORS:
        hostile = changed(call, torch.arange(LENGTH) >= 100, factor)
        after, _ = stream(hostile, [70, 70], backend)
        assert (before - after)[..., :100, :].abs().max() <= 2e-6


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_tokens_that_are_seen_leave_averages(backend, options):
    """Rows that do see huge keys stay averages of their values."""
    for mode in ("bidirectional", "causal"):
        call = make_call(by_name("positive"), LENGTH, mode, batch=1, **options)
        call = changed(call, torch.arange(LENGTH) % 7 == 3, 250.0)
        ones = torch.ones_like(call.value)
        out = favor_attention(
            call.query, call.key, ones, call.feature_map, backend=backend, **call.options
        )
        torch.testing.assert_close(out, ones, rtol=0, atol=1e-5)
