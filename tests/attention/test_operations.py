"""Numbers of operations that the ``torch`` backend issues where each is a launch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from performers import SoftmaxFeatures, favor_attention

# Parts of names of views and constants, which launch nothing.
_FREE = ("view", "expand", "squeeze", "transpose", "select", "slice", "detach", "permute",
         "unbind", "split", "alias", "scalar_tensor", "lift_fresh")  # fmt: skip


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.operations += name != "aten::t" and not any(x in name for x in _FREE)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("is_causal", "most"), [(False, 200), (True, 700)])
def test_a_long_call_on_an_accelerator(is_causal, most):
    features = SoftmaxFeatures(64, 256).to("meta")
    inputs = (torch.empty(8, 16, 16384, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    with _Count() as count, torch.no_grad():
        favor_attention(*inputs, features, is_causal=is_causal, backend="torch")
    assert count.operations <= most
