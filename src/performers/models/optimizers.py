"""Muon for the matrices of a model and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Muon on the weight matrices inside a model, AdamW on embeddings, output layer and vectors.

    Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, so
    that all its directions are learnt at the same pace. Updates are scaled to the size of AdamW's
    (Liu et al. 2025), hence one learning rate serves both: that of AdamW or up to twice as much.

    Args:
        model: A transformers model; embeddings and the output layer are known by its methods.
        lr: Learning rate of all groups; each group has its own for schedulers to set.
        weight_decay: Of matrices and embeddings; vectors (biases, norms) have none.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        RuntimeError: This torch has no Muon; it came with 2.9.
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
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise RuntimeError(f"Muon needs torch 2.9 or later, this is {torch.__version__}")
        matrices, tables, vectors = _kinds_of_parameters(model)
        groups = [
            {"params": tables, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # Empty groups are no error in AdamW; Muon refuses to have nothing to do.
        self._parts: list[Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps)
        ]
        if matrices:
            self._parts.insert(
                0,
                muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            )
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share_groups()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, of a model with the same parameters."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        """The parts' own groups, so that a scheduler's learning rates reach them."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def _kinds_of_parameters(
    model: PreTrainedModel,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices inside the model; embeddings and output layer; everything of another shape."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        outside.add(id(head.weight))
    matrices, tables, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim == 2 and id(parameter) not in outside:
            matrices.append(parameter)
        else:
            tables.append(parameter)
    return matrices, tables, vectors
