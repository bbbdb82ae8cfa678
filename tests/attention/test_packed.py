"""Packed sequences: each as if it were alone."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import (
    ALL,
    BACKENDS,
    FEW,
    TESTED,
    check_against_oracle,
    make_call,
    random_mask,
)
from tests.features.cases import by_name, generator

PACKINGS = {
    "one": [0, 140],
    "two": [0, 70, 140],
    "empty": [0, 0, 1, 1, 1, 64, 65, 65, 140, 140],
    "singles": list(range(141)),
    "boundary": [0, 63, 64, 128, 129, 140],
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_packings(backend, case, mode, packing):
    offsets = torch.tensor(PACKINGS[packing], dtype=torch.int32)
    call = make_call(case, 140, mode, batch=1, heads=4, key_heads=2, cu_seqlens=offsets)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_map_packed_and_masked(backend, case, mode):
    call = make_call(case, 140, mode, batch=1, cu_seqlens=torch.tensor([0, 3, 3, 67, 140]), seed=1)
    call.options["key_mask"] = random_mask(1, 140, seed=1)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["positive", "relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_one_at_a_time(backend, name, mode):
    """Values and gradients of separate calls."""
    lengths = [5, 0, 64, 1, 200, 63]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    call = make_call(by_name(name), sum(lengths), mode, batch=1, cu_seqlens=offsets, seed=2)
    packed, separate = call.leaves(), call.leaves()
    out = packed.run(backend)
    options = {name: x for name, x in call.options.items() if name != "cu_seqlens"}
    parts = [
        favor_attention(*sequence, call.feature_map, backend=backend, **options)
        for sequence in zip(*(x.split(lengths, dim=-2) for x in separate.inputs), strict=True)
    ]
    expected = torch.cat(parts, dim=-2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    weight = torch.randn(out.shape, generator=generator(3))
    for a, b in zip(
        torch.autograd.grad(out, packed.inputs, weight),
        torch.autograd.grad(expected, separate.inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_either_integer_type(backend, mode):
    call = make_call(by_name("positive"), 20, mode, batch=1)
    outputs = [
        call.run(backend, cu_seqlens=torch.tensor([0, 7, 20], dtype=dtype))
        for dtype in (torch.int32, torch.int64)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_packed(backend, mode):
    call = make_call(by_name("positive"), 0, mode, batch=1)
    assert call.run(backend, cu_seqlens=torch.tensor([0, 0])).shape == (1, 2, 0, 8)
    assert call.run(backend, cu_seqlens=torch.tensor([0])).shape == (1, 2, 0, 8)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_masked_sequences_inside_a_packing(backend, mode):
    """A sequence all of whose keys are masked gives zeros, its neighbours notice nothing."""
    call = make_call(
        by_name("positive"), 140, mode, batch=1, cu_seqlens=torch.tensor([0, 50, 90, 140])
    )
    mask = torch.ones(1, 140, dtype=torch.bool)
    mask[:, 50:90] = False
    out = call.run(backend, key_mask=mask)
    assert (out[..., 50:90, :] == 0).all()
    plain = call.run(backend)
    torch.testing.assert_close(out[..., :50, :], plain[..., :50, :], rtol=0, atol=2e-6)
    torch.testing.assert_close(out[..., 90:, :], plain[..., 90:, :], rtol=0, atol=2e-6)
