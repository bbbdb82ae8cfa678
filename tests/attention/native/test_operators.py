"""``performers::favor_forward`` and ``favor_backward`` keep the contract of a torch operator."""

import pytest
import torch

from performers.attention.native.operators import favor_backward, favor_forward
from tests.attention.cases import ALL, make_call, random_mask
from tests.attention.native.support import (
    NATIVE,
    operator_arguments,
)
from tests.features.cases import generator

pytestmark = NATIVE

CASES = {case.name: case for case in ALL}
OFFSETS = torch.tensor([0, 3, 3, 7, 12])


def transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def arguments(
    name="positive", mode="bidirectional", *, resumed=False, return_state=False, how=None, **options
):
    """The operator's arguments for a small call; its tensors are leaves that want gradients."""
    batch = 1 if "cu_seqlens" in options else 2
    call = make_call(
        CASES[name],
        12,
        mode,
        batch=batch,
        **{"heads": 4, "head_dim": 8, "value_dim": 5, "num_features": 10, **options},
    )
    state = None
    if resumed:
        _, state = call.run("native", return_state=True)
        for tensor in (state.key_value, state.key_sum):
            tensor.requires_grad_()
    if how is not None:
        call.query, call.key, call.value = (how(x) for x in call.inputs)
    return operator_arguments(call.leaves(), state, return_state)


CALLS = {
    "bidirectional": {},
    "causal": {"mode": "causal"},
    "cross": {"mode": "cross"},
    "rectified": {"name": "relu", "mode": "causal"},
    "rectified without projection": {"name": "deterministic-relu"},
    "bias": {"name": "bias"},
    "hyperbolic": {"name": "hyperbolic", "mode": "causal"},
    "without the norm": {"name": "exp-no-epsilon"},
    "packed": {"cu_seqlens": OFFSETS},
    "packed, causal": {"mode": "causal", "cu_seqlens": OFFSETS},
    "masked": {"key_mask": random_mask(2, 12)},
    "masked, causal": {"mode": "causal", "key_mask": random_mask(2, 12)},
    "grouped heads": {"key_heads": 2},
    "one projection a head": {"key_heads": 2, "num_heads": 2, "mode": "causal"},
    "final state": {"mode": "causal", "return_state": True},
    "state": {"mode": "causal", "resumed": True},
    "state to state": {"mode": "causal", "resumed": True, "return_state": True, "key_heads": 2},
    "rectified state to state": {
        "name": "relu",
        "mode": "causal",
        "resumed": True,
        "return_state": True,
    },
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, causal": {"dtype": torch.float16, "mode": "causal"},
    "transposed": {"how": transposed, "key_heads": 2},
    "transposed, causal": {"how": transposed, "mode": "causal"},
    "every other column": {"how": lambda x: x.repeat_interleave(2, -1)[..., ::2]},
}


@pytest.mark.parametrize("name", CALLS)
def test_forward(name):
    torch.library.opcheck(favor_forward, arguments(**CALLS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_backward(name):
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(**CALLS[name])]
    results = favor_forward(*given)
    return_state = given[-1]
    random = generator(1)
    grad_out, *grads = (torch.randn(x.shape, generator=random) for x in (results[0], *results[3:5]))
    final = grads if return_state else (None, None)
    torch.library.opcheck(favor_backward, (grad_out, *final, None, *given, *results, False))


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_left_alone_and_results_do_not_alias(name):
    given = arguments(**CALLS[name])
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in tensors]
    results = favor_forward(*given)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    filled = [x for x in results if x.numel()]
    storages = {x.untyped_storage().data_ptr() for x in (*tensors, *filled)}
    assert len(storages) == len({x.untyped_storage().data_ptr() for x in tensors}) + len(filled)


@pytest.mark.parametrize("name", CALLS)
def test_every_result_is_written(name, monkeypatch):
    """New memory is poisoned: what a kernel does not write shows up as NaN."""
    given = arguments(**CALLS[name])
    with torch.no_grad():
        expected = favor_forward(*given)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        results = favor_forward(*given)
        tensors = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
        gradients = torch.autograd.grad(results[0].sum(), tensors, allow_unused=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(g.isfinite().all() for g in gradients)
