"""No change of a later token, of any size, moves an earlier output or its gradient."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import ALL, BACKENDS, FEW, TESTED, make_call
from tests.features.cases import by_name

LENGTH = 140
FACTORS = (1e4, 0.0, 1e-3)


def changed_after(call, position, factor):
    """The same call with query, key and value from ``position`` on multiplied by ``factor``."""
    later = torch.arange(call.query.shape[-2])[:, None] >= position
    inputs = (torch.where(later, x * factor, x) for x in call.inputs)
    return type(call)(call.case, call.feature_map, *inputs, call.options)


def assert_unmoved(before, after, conditioning):
    """By 2e-6, times what a normaliser near zero makes of rounding."""
    size = conditioning * (1 + before.abs().amax(-1, keepdim=True))
    bound = 2e-6 * torch.where(conditioning > 1 + 1e-9, size, torch.ones_like(size))
    assert ((before - after).abs() <= bound).all(), (before - after).abs().max()


@pytest.mark.parametrize("position", [1, 63, 64, 65, 128, 139])
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_later_tokens_do_not_matter(backend, case, position):
    call = make_call(case, LENGTH, "causal", batch=1, seed=position)
    before, (_, conditioning) = call.run(backend), call.expected()
    for factor in FACTORS:
        after = changed_after(call, position, factor).run(backend)
        assert torch.isfinite(after).all()
        assert_unmoved(
            before[..., :position, :], after[..., :position, :], conditioning[..., :position, :]
        )


@pytest.mark.parametrize("case", FEW, ids=str)
def test_later_tokens_do_not_matter_to_the_reference(case):
    call = make_call(case, LENGTH, "causal", batch=1)
    before, (_, conditioning) = call.run("reference"), call.expected()
    for position in (64, 100):
        for factor in FACTORS:
            after = changed_after(call, position, factor).run("reference")
            assert_unmoved(
                before[..., :position, :], after[..., :position, :], conditioning[..., :position, :]
            )


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "relu", "exp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_later_token_alone_does_not_matter(backend, name):
    """A single hostile key in the middle: queries, keys and values changed one at a time."""
    call = make_call(by_name(name), LENGTH, "causal", batch=1)
    before = call.run(backend)
    for position in (64, 90):
        for which in ("query", "key", "value"):
            for factor in FACTORS:
                hostile = changed_after(call, position + 1, 1.0)
                x = getattr(hostile, which).clone()
                x[..., position, :] *= factor
                setattr(hostile, which, x)
                after = hostile.run(backend)
                assert (before - after)[..., :position, :].abs().max() <= 2e-6


@pytest.mark.parametrize("factor", [1.0, 1e4])
@pytest.mark.parametrize("position", [1, 64, 65, 100])
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_of_earlier_outputs_stop_at_later_tokens(backend, case, position, factor):
    call = changed_after(
        make_call(case, LENGTH, "causal", batch=1, seed=position), position, factor
    ).leaves()
    call.run(backend)[..., :position, :].square().sum().backward()
    for x in call.inputs:
        assert (x.grad[..., position:, :] == 0).all()
        assert torch.isfinite(x.grad).all()
    assert (call.value.grad[..., :position, :] != 0).any()


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_packed_sequences_do_not_see_each_other(backend, case, mode):
    offsets = [0, 1, 40, 40, 64, 129, LENGTH]
    call = make_call(
        case, LENGTH, mode, batch=1, cu_seqlens=torch.tensor(offsets, dtype=torch.int32)
    )
    before, (_, conditioning) = call.run(backend), call.expected()
    index = torch.arange(LENGTH)[:, None]
    for start, stop in ((1, 40), (64, 129)):
        others = (index < start) | (index >= stop)
        for factor in FACTORS:
            inputs = [torch.where(others, x * factor, x) for x in call.inputs]
            after = favor_attention(*inputs, call.feature_map, backend=backend, **call.options)
            rows = slice(start, stop)
            assert_unmoved(before[..., rows, :], after[..., rows, :], conditioning[..., rows, :])


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_packed_gradients_stop_at_other_sequences(backend, case, mode):
    call = make_call(
        case, LENGTH, mode, batch=1, cu_seqlens=torch.tensor([0, 30, 66, 66, LENGTH])
    ).leaves()
    call.run(backend)[..., 30:66, :].square().sum().backward()
    for x in call.inputs:
        assert (x.grad[..., :30, :] == 0).all()
        assert (x.grad[..., 66:, :] == 0).all()
    assert (call.value.grad[..., 30:66, :] != 0).any()


@pytest.mark.parametrize("backend", TESTED)
def test_packed_causal_sequences_do_not_see_their_own_future(backend):
    call = make_call(
        by_name("positive"),
        LENGTH,
        "causal",
        batch=1,
        cu_seqlens=torch.tensor([0, 30, 66, 66, LENGTH]),
    )
    before = call.run(backend)
    for position in (31, 64, 65, 67, 100):
        for factor in FACTORS:
            after = changed_after(call, position, factor).run(backend)
            assert (before - after)[..., :position, :].abs().max() <= 2e-6


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_a_state_does_not_change_what_came_before(backend, case):
    """Chunks of a stream are as causal as one call: the past is all that a state carries."""
    call = make_call(case, LENGTH, "causal", batch=1)
    _, (_, conditioning) = call.run(backend), call.expected()
    outputs = []
    for factor in (1.0, *FACTORS):
        hostile = changed_after(call, 100, factor)
        parts, state = [], None
        for rows in (slice(0, 70), slice(70, LENGTH)):
            out, state = favor_attention(
                *(x[..., rows, :] for x in hostile.inputs),
                call.feature_map,
                is_causal=True,
                state=state,
                return_state=True,
                backend=backend,
            )
            parts.append(out)
        outputs.append(torch.cat(parts, dim=-2)[..., :100, :])
    for after in outputs[1:]:
        assert_unmoved(outputs[0], after, conditioning[..., :100, :])
