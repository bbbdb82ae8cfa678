"""Packed sequences: each as if it were alone."""

import torch

from tests.attention.cases import (
    PACKED,
    POSITIVE,
    SELF,
    assert_close_gradients,
    assert_close_rows,
    law,
    make_call,
    with_gradients,
)
from tests.features.cases import generator


@law(configurations=PACKED, modes=SELF)
def test_packed_equals_one_at_a_time(backend, case, configuration, mode, device):
    """Values and gradients of separate calls."""
    lengths = [5, 0, 64, 1, 200, 63]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    call = make_call(case, sum(lengths), mode, configuration, seed=2, device=device)
    call.options["cu_seqlens"] = offsets
    _, conditioning = call.expected()
    weight = torch.randn(*call.query.shape[:3], 8, generator=generator(3)) / conditioning**2
    weight = weight.to(call.query)
    packed, *gradients = with_gradients(call, backend, weight)
    del call.options["cu_seqlens"]
    masks = call.options.pop("key_mask", torch.ones_like(call.key[:, 0, :, 0]).bool())
    inputs = zip(*(x.split(lengths, dim=-2) for x in (*call.inputs, weight)), strict=True)
    parts = [
        with_gradients(call.with_inputs(*sequence), backend, rows, key_mask=mask)
        for (*sequence, rows), mask in zip(inputs, masks.split(lengths, dim=1), strict=True)
    ]
    expected, *wanted = (torch.cat(x, dim=-2) for x in zip(*parts, strict=True))
    assert_close_rows(packed, expected, conditioning, 1e-5)
    assert_close_gradients(gradients, wanted)


@law(configurations=PACKED, modes=SELF)
def test_nothing_packed(backend, configuration, mode):
    call = make_call(POSITIVE, 0, mode, configuration, heads=4)
    assert call.run(backend, cu_seqlens=torch.tensor([0, 0])).shape == (1, 4, 0, 8)
    assert call.run(backend, cu_seqlens=torch.tensor([0])).shape == (1, 4, 0, 8)
