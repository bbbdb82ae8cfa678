"""Training on molecules and on packages, and predictions by size of batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.loader import DataLoader

from studies.graphs.debian import NodeTask
from studies.graphs.models import (
    NODE_MODELS,
    PYG,
    PYG_BIASED,
    MoleculeModel,
    NodeModel,
    corrected,
    neighbours_of,
    parameters,
    set_neighbours,
)
from studies.graphs.molecules import Molecules, targets
from studies.parts import Part
from studies.training import descend

_BATCH = 64
_WARMUP = 0.1
# Test molecules that are predicted alone and in batches.
_COMPARED = 128
# Layers on packages, and steps from one validation to the next.
_NODE_LAYERS, _EVERY = 2, 4


def train_molecules(
    read: Callable[[], Molecules], attention: str, layers: int, epochs: int, seed: int
) -> Part:
    """Train on absolute errors, and measure the test set in the best epoch by validation.

    Returns:
        ``test_mae`` and ``validation_mae``, ``by_batch`` (`compare_batches`), ``parameters`` and
        ``cpu_seconds`` of training; for PyG's Performer ``corrected``, as ``by_batch`` of the same
        parameters in ours.
    """
    molecules = read()
    torch.manual_seed(seed)
    model = MoleculeModel(attention, layers, molecules.atoms, molecules.bonds)
    wanted = targets(molecules.train)
    mean, spread = wanted.mean(), wanted.std()

    def predict(graphs: Sequence[Any], batch: int = _BATCH, by: nn.Module = model) -> Tensor:
        by.eval()
        with torch.no_grad():
            return torch.cat([by(x) for x in DataLoader(graphs, batch)]) * spread + mean

    def error(graphs: Sequence[Any]) -> float:
        return (predict(graphs) - targets(graphs)).abs().mean().item()

    loader = DataLoader(molecules.train, _BATCH, shuffle=True, drop_last=True)
    optimizer, schedule = _optimizer(model, 2e-3, epochs * len(loader))
    start = time.process_time()
    best, kept = float("inf"), model.state_dict()
    for _ in range(epochs):
        model.train()
        for batch in loader:
            loss = (model(batch) - (batch.y - mean) / spread).abs().mean()
            descend(loss, optimizer, schedule)
        if (found := error(molecules.validation)) < best:
            best, kept = found, {name: x.clone() for name, x in model.state_dict().items()}
    seconds = time.process_time() - start
    model.load_state_dict(kept)
    some = molecules.test[:_COMPARED]
    by_batch = {"by_batch": compare_batches(predict, some)}
    if attention in (PYG, PYG_BIASED):
        by_batch["corrected"] = compare_batches(partial(predict, by=corrected(model)), some)
    return {
        "test_mae": error(molecules.test),
        "validation_mae": best,
        "mean_mae": (targets(molecules.test) - mean).abs().mean().item(),
        **by_batch,
        "parameters": parameters(model),
        "cpu_seconds": seconds,
    }


def compare_batches(predict: Callable[[Sequence[Any], int], Tensor], graphs: Sequence[Any]) -> Part:
    """Predictions of graphs one at a time and in batches of 64.

    Returns:
        ``mae_alone`` and ``mae_batched``, and ``largest`` and ``median`` of the absolute changes.
    """
    wanted = targets(graphs)
    alone, batched = predict(graphs, 1), predict(graphs, _BATCH)
    change = (alone - batched).abs()
    return {
        "mae_alone": (alone - wanted).abs().mean().item(),
        "mae_batched": (batched - wanted).abs().mean().item(),
        "largest": change.max().item(),
        "median": change.median().item(),
    }


def train_nodes(read: Callable[[], NodeTask], name: str, steps: int, seed: int) -> Part:
    """Train on the whole graph, and measure test packages in the best step by validation.

    Returns:
        ``test`` and ``validation`` accuracy, ``parameters`` and ``cpu_seconds`` of training.
    """
    task = read()
    torch.manual_seed(seed)
    model = NodeModel(*NODE_MODELS[name], _NODE_LAYERS, task.classes)
    set_neighbours(model, neighbours_of(task.edge_index, len(task.labels)))
    optimizer, schedule = _optimizer(model, 2e-2, steps)
    train = (task.split == 0).nonzero().squeeze(1)
    start = time.process_time()
    best: dict[str, float] = {"validation": -1.0}
    for step in range(1, steps + 1):
        model.train()
        descend(F.cross_entropy(model(task)[train], task.labels[train]), optimizer, schedule)
        if step % _EVERY == 0 or step == steps:
            best = max(best, _accuracies(model, task), key=lambda x: x["validation"])
    return {
        **best,
        "parameters": parameters(model),
        "cpu_seconds": time.process_time() - start,
    }


@torch.no_grad()
def _accuracies(model: nn.Module, task: NodeTask) -> dict[str, float]:
    """Shares of validation and test packages whose section is right."""
    model.eval()
    right = (model(task).argmax(1) == task.labels).float()
    names = {"validation": 1, "test": 2}
    return {name: right[task.split == part].mean().item() for name, part in names.items()}


def _optimizer(
    model: nn.Module, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW whose rate rises for a tenth of the steps and falls along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=_WARMUP, cycle_momentum=False
    )
    return optimizer, schedule
