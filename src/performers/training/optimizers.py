"""Muon for the matrices of a model and AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

# Keller Jordan's: from Frobenius norm 1, five steps take singular values to 0.7 to 1.2.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) with updates of the size of AdamW's (Liu et al. 2025).

    For a matrix ``W`` of shape ``(n, m)`` with gradient ``G``, momentum ``M`` and factor ``b``,

    ``M = b M + (1 - b) G``, ``W = (1 - lr weight_decay) W - 0.2 sqrt(max(n, m)) lr O``

    where ``O`` is ``orthogonalized((1 - b) G + b M)`` and ``b`` is ``momentum``. Differs from
    ``torch.optim.Muon`` (with ``adjust_lr_fn="match_rms_adamw"``) in what it iterates in: float32
    on CPUs, of which few multiply bfloat16, and all matrices of a shape at once.
    """

    def __init__(
        self, matrices: list[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; returns the loss of ``closure``, if any."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape, matrix.dtype, matrix.device].append(matrix)
            for (shape, *_), matrices in alike.items():
                updates = orthogonalized(torch.stack([self._averaged(x, group) for x in matrices]))
                rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-rate)
        return loss

    def _averaged(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's look ahead of the momentum of a gradient, which is updated."""
        grad, state = matrix.grad, self.state[matrix]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices ``(N, n, m)`` with their singular values brought near one.

    Newton-Schulz iteration: ``X = a X + (b X X^T + c (X X^T)^2) X``.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(Optimizer):
    """Muon on the weight matrices inside a model, AdamW on embeddings, output layer and vectors.

    `Muon` replaces the momentum of a matrix by the nearest orthogonal one, so that all its
    directions are learnt at the same pace. Updates are of the size of AdamW's, hence one learning
    rate serves both. A fused projection of queries, keys and values counts as one matrix.
    Parameters may be replicated (data parallelism) but not sharded.

    Args:
        model: A transformers model. The layer of a classifier counts as a matrix inside.
        lr: Learning rate of all groups, which schedulers set for each group.
        weight_decay: Weight decay of all parameters but vectors (biases, norms).
        betas: Those of AdamW, as ``eps`` is its epsilon.

    Raises:
        ValueError: No parameter of the model requires a gradient.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-9,
    ) -> None:
        matrices, others, vectors = _kinds_of_parameters(model)
        groups = [
            {"params": others, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        parts: list[Optimizer] = []
        # Both refuse an empty list of parameters.
        if matrices:
            parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
        if groups:
            parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps))
        if not parts:
            raise ValueError("model has no parameter that requires a gradient")
        super().__init__([group for part in parts for group in part.param_groups], {"lr": lr})
        self._parts = parts
        self._share_groups()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of both optimizers; returns the loss of ``closure``, if any."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimizers."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of a model with the same parameters."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups after construction: they could belong to either optimizer."""
        if hasattr(self, "_parts"):
            raise NotImplementedError(
                "MuonAdamW takes its parameters from the model; unfreeze them and make a new one"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, which includes both optimizers."""
        return {**super().__getstate__(), "_parts": self._parts}

    def _share_groups(self) -> None:
        """Refer to the groups of the parts, which the learning rates of a scheduler must reach."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def _kinds_of_parameters(
    model: PreTrainedModel,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices inside the model; embeddings, output layer and higher ranks; vectors."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        outside.add(id(head.weight))
    matrices, others, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim == 2 and id(parameter) not in outside:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return matrices, others, vectors
