"""Recommendation on MovieLens-100k: the next film of a viewer, ranked among all films."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from performers.app.errors import UserError
from studies.catalogue.models import CausalPerformer
from studies.catalogue.negatives import CatalogueLoss, FixedLoss, Loss, full_loss
from studies.parts import Part
from studies.training import descend

_LENGTH = 50
_BATCH = 64
_WIDTH = 64
_SAMPLES = 100

LOSSES: dict[str, Callable[[Tensor, Tensor], Loss]] = {
    "full softmax": lambda items, weight: full_loss,
    "uniform": lambda items, weight: FixedLoss(torch.ones_like(weight), _SAMPLES),
    "popularity": lambda items, weight: FixedLoss(weight, _SAMPLES),
    "CatalogueSampler": lambda items, weight: CatalogueLoss(items, _SAMPLES),
}
"""Losses, with 100 draws for each query, as functions of the items and their popularity."""


def read_sequences(path: str) -> tuple[list[list[int]], int]:
    """Films of each viewer in the order of their ratings, and the number of films.

    Args:
        path: A table with the columns ``user_id``, ``item_id``, ``rating`` and ``timestamp``, or
            the wheel of recbole that has it.

    Raises:
        UserError: The file cannot be read or has no such table.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                text = wheel.read("recbole/dataset_example/ml-100k/ml-100k.inter").decode()
        else:
            text = Path(path).read_text(encoding="utf-8")
        ratings = [
            (int(user), int(time), int(item))
            for user, item, _, time in (line.split("\t") for line in text.splitlines()[1:])
        ]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--ratings {path} is not MovieLens-100k as recbole has it: {error}"
        ) from error
    numbers = {item: i for i, item in enumerate(sorted({item for _, _, item in ratings}))}
    rows: dict[int, list[int]] = {}
    for user, _, item in sorted(ratings):
        rows.setdefault(user, []).append(numbers[item])
    return [row for row in rows.values() if len(row) > 2], len(numbers)


def train_and_rank(rows: list[list[int]], count: int, name: str, epochs: int, seed: int) -> Part:
    """Train on all films of a viewer but the last, and rank the last among all films.

    Films that the viewer has rated already are ranked too.

    Returns:
        ``ndcg`` and ``hits`` at 10, and ``cpu_seconds`` of training.
    """
    torch.manual_seed(seed)
    model = CausalPerformer(count, _WIDTH, 2, 2, _LENGTH, dropout=0.2)
    weight = torch.tensor([x for row in rows for x in row[:-1]]).bincount(minlength=count) + 1.0
    loss_of = LOSSES[name](model.items(), weight)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    start = time.process_time()
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(_BATCH):
            inputs, targets = _windows([rows[i] for i in batch.tolist()])
            kept = targets >= 0
            descend(loss_of(model(inputs)[kept], model.items(), targets[kept]), optimizer)
    seconds = time.process_time() - start
    model.eval()
    ranks = []
    with torch.no_grad():
        for first in range(0, len(rows), 256):
            part = rows[first : first + 256]
            inputs = torch.zeros(len(part), _LENGTH, dtype=torch.int64)
            last = torch.tensor([min(len(row) - 1, _LENGTH) - 1 for row in part])
            for line, row in zip(inputs, part, strict=True):
                seen = row[:-1][-_LENGTH:]
                line[: len(seen)] = torch.tensor(seen)
            scores = model(inputs)[torch.arange(len(part)), last] @ model.items().T
            right = scores.gather(1, torch.tensor([[row[-1]] for row in part]))
            ranks.append((scores > right).sum(1))
    rank = torch.cat(ranks)
    gain = (rank < 10) / (rank + 2.0).log2()
    return {
        "ndcg": gain.mean().item(),
        "hits": (rank < 10).float().mean().item(),
        "cpu_seconds": seconds,
    }


def _windows(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """A window of each row at a random place, without its last film, and the films after."""
    inputs = torch.zeros(len(rows), _LENGTH, dtype=torch.int64)
    targets = torch.full_like(inputs, -1)
    for i, row in enumerate(rows):
        seen = row[:-1]
        first = int(torch.randint(max(1, len(seen) - _LENGTH), ()))
        window = torch.tensor(seen[first : first + _LENGTH + 1])
        inputs[i, : len(window) - 1] = window[:-1]
        targets[i, : len(window) - 1] = window[1:]
    return inputs, targets
