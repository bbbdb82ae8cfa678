"""One measured call: a forward pass, or a forward and a backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from performers.benchmark.contestants import Attention
from performers.benchmark.workload import Inputs, Workload


class AttentionCall:
    """Runs attention on fixed inputs; each call forgets the one before.

    Args:
        attend: The attention.
        inputs: What it is run on; requiring gradients for a backward pass.
        backward: Whether gradients of query, key and value are computed as well.
        between: Called before, after and between the passes, as other layers of a model would be.
    """

    def __init__(
        self,
        attend: Attention,
        inputs: Inputs,
        *,
        backward: bool,
        between: Callable[[], object] | None = None,
    ) -> None:
        self._attend = attend
        self._inputs = inputs
        self._backward = backward
        self._between = between

    def __call__(self) -> tuple[Tensor | None, ...]:
        """The output, and the gradients where asked for (None for what has no influence)."""
        query, key, value, grad = self._inputs
        self._other_work()
        if not self._backward:
            with torch.no_grad():
                out = self._attend(query, key, value)
            self._other_work()
            return (out,)
        out = self._attend(query, key, value)
        self._other_work()
        # Not backward(): it would add to gradients kept from call to call.
        gradients = torch.autograd.grad(out, (query, key, value), grad, allow_unused=True)
        self._other_work()
        return (out.detach(), *gradients)

    def _other_work(self) -> None:
        if self._between is not None:
            self._between()


class Matmuls:
    """The product of a model's hidden states with a square matrix, into memory kept.

    Two thread pools that spin against each other look fast one at a time. Work of torch's own pool
    between the calls of another shows what they cost each other.

    Args:
        workload: Shapes; the hidden size is ``heads * head_dim``.
        length: Tokens.
    """

    def __init__(self, workload: Workload, length: int) -> None:
        hidden = workload.heads * workload.head_dim
        generator = torch.Generator().manual_seed(workload.seed)
        self._states = torch.randn(workload.batch * length, hidden, generator=generator)
        self._states = self._states.to(workload.torch_dtype)
        self._weight = torch.randn(hidden, hidden, generator=generator).to(workload.torch_dtype)
        self._out = torch.empty_like(self._states)

    def __call__(self) -> None:
        """Multiply once."""
        torch.mm(self._states, self._weight, out=self._out)
