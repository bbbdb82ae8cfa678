"""Muon for the matrices of a model and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel


class MuonAdamW(Optimizer):
    """Muon on the weight matrices inside a model, AdamW on embeddings, output layer and vectors.

    Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, so
    that all its directions are learnt at the same pace. Updates are scaled to the size of AdamW's
    (Liu et al. 2025), hence one learning rate serves both. A fused projection of queries, keys and
    values counts as one matrix. Parameters may be replicated (data parallelism) but not sharded.

    Args:
        model: A transformers model. The layer of a classifier counts as a matrix inside.
        lr: Learning rate of all groups, which schedulers set for each group.
        weight_decay: Weight decay of all parameters but vectors (biases, norms).
        betas: Those of AdamW, as ``eps`` is its epsilon.

    Raises:
        RuntimeError: torch is older than 2.9 and has no Muon.
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
        check_muon()
        matrices, others, vectors = _kinds_of_parameters(model)
        groups = [
            {"params": others, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._parts: list[Optimizer] = []
        # Both refuse an empty list of parameters.
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        if groups:
            self._parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps))
        if not self._parts:
            raise ValueError("model has no parameter that requires a gradient")
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share_groups()
        self._made = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of both optimizers; returns the loss of ``closure``, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
        if getattr(self, "_made", False):
            raise NotImplementedError(
                "MuonAdamW takes its parameters from the model; unfreeze them and make a new one"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, which includes both optimizers."""
        return {**super().__getstate__(), "_parts": self._parts, "_made": True}

    def _share_groups(self) -> None:
        """Refer to the groups of the parts, which the learning rates of a scheduler must reach."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def check_muon() -> None:
    """Raise RuntimeError if torch is older than 2.9 and has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"Muon needs torch 2.9 or later, this is {torch.__version__}: upgrade torch, or train "
            "with AdamW"
        )


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
