"""Accuracy of small models against their depth."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from performers.models import PerformerConfig, PerformerModel
from studies.parts import Part
from studies.sparse.attentions import settings
from studies.sparse.tasks import IGNORED, TASKS, Task
from studies.training import descend

SOLVED = 0.95
"""Accuracy of a task that is solved."""
_LEARNT, _RECENT = 0.995, 10
_SPREAD = 0.5
_WARM_UP = 0.2


@dataclass(frozen=True)
class TrainingSize:
    """Sizes of the models and of their training."""

    depths: tuple[int, ...] = (1, 2, 3, 6)
    length: int = 128
    keys: int = 12
    hidden: int = 32
    heads: int = 2
    steps: int = 300
    rows: int = 8
    test_rows: int = 64
    learning_rate: float = 1e-2


class Solver(nn.Module):
    """A causal Performer model over tokens of two parts."""

    def __init__(self, name: str, depth: int, task: Task, size: TrainingSize) -> None:
        super().__init__()
        config = PerformerConfig(
            **settings(size.length, size.keys, is_causal=True)[name],
            vocab_size=1,
            pad_token_id=None,
            hidden_size=size.hidden,
            intermediate_size=size.hidden,
            num_hidden_layers=depth,
            num_attention_heads=size.heads,
            max_position_embeddings=size.length,
            position_embedding="rotary",
            is_decoder=True,
            hidden_dropout_prob=0.0,
            initializer_range=0.2,
        )
        parts = [nn.Embedding(count, size.hidden) for count in task.parts]
        for embedding in parts:
            nn.init.normal_(embedding.weight, std=_SPREAD)
        self.parts = nn.ModuleList(parts)
        self.model = PerformerModel(config)
        self.classes = nn.Linear(size.hidden, task.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(rows, length, classes)``."""
        embedded = sum(part(x) for part, x in zip(self.parts, tokens.unbind(-1), strict=True))
        states = self.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits: Tensor = self.classes(states)
        return logits


def train(task: str, name: str, depth: int, seed: int, size: TrainingSize) -> Part:
    """Train a model until it solves the task or its steps are over.

    Returns:
        ``accuracy`` on rows it was not trained on, and ``steps``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Solver(name, depth, TASKS[task], size).train()
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad),
        lr=size.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, size.learning_rate, total_steps=size.steps, pct_start=_WARM_UP
    )
    recent: deque[float] = deque(maxlen=_RECENT)
    step = 0
    while step < size.steps and not (len(recent) == _RECENT and sum(recent) >= _LEARNT * _RECENT):
        tokens, labels = TASKS[task].draw(size.rows, size.length, generator)
        logits, known = model(tokens), labels != IGNORED
        loss = F.cross_entropy(logits[known], labels[known])
        descend(loss, optimizer, schedule)
        recent.append(_accuracy(logits, labels))
        step += 1
    test = TASKS[task].draw(size.test_rows, size.length, torch.Generator().manual_seed(2**20))
    with torch.no_grad():
        accuracy = _accuracy(model.eval()(test[0]), test[1])
    return {"accuracy": accuracy, "steps": step}


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers in the last quarter of the rows."""
    last = slice(labels.shape[1] * 3 // 4, None)
    logits, labels = logits[:, last], labels[:, last]
    known = labels != IGNORED
    return (logits.argmax(-1)[known] == labels[known]).double().mean().item()
