"""Training of small models on rows of relatives, and their scores."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from performers.cli.console import note
from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.objectives import MaskedCollator
from performers.proteins.inputs.packing import LengthBucketedBatchSampler
from performers.proteins.scoring.batches import evaluation_mode
from performers.proteins.scoring.metrics import ResidueMetrics
from studies.families.attentions import NAME
from studies.families.scored import TOKENIZER, Scored


@dataclass(frozen=True)
class Contestant:
    """A model's attention and positions.

    Attributes:
        attention: Name of its attention.
        options: Options of that attention.
        config: Other options of the configuration.
        restart: Positions restart in each member; otherwise they count through the row.
    """

    attention: str = NAME
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    restart: bool = True


CONTESTANTS = {
    "exact": Contestant("exact"),
    "features": Contestant(),
    "features, window over positions": Contestant(
        "favor-softmax", config={"window": 8, "position_window": 8}
    ),
    "exact, positions of the row": Contestant("exact", restart=False),
    "learned features": Contestant(options={"learned": True}),
    "features, listed keys": Contestant(options={"listed_keys": 16}),
}
"""Attentions by name; all but the exact ones have a window of 8 tokens in the row."""


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its training.

    Attributes:
        hidden_size: Width.
        num_layers: Blocks.
        num_heads: Heads.
        num_features: Random features of a head.
        steps: Training steps.
        batch_tokens: Tokens of a batch, padding included.
        learning_rate: Peak learning rate.
        every: Steps between scores.
    """

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_features: int = 64
    steps: int = 1000
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    every: int = 100


def make_model(contestant: Contestant, shape: Shape, seed: int) -> PerformerForMaskedLM:
    """A model without dropout, its weights and features drawn with the seed."""
    torch.manual_seed(seed)
    config = PerformerConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=4 * shape.hidden_size,
        hidden_dropout_prob=0.0,
        num_features=shape.num_features,
        attention=contestant.attention,
        attention_options=contestant.options,
        **contestant.config,
    )
    return PerformerForMaskedLM(config)


def inputs(batch: dict[str, Tensor], contestant: Contestant) -> dict[str, Tensor]:
    """The batch as the model reads it."""
    return {name: x for name, x in batch.items() if contestant.restart or name != "position_ids"}


def score(
    model: PerformerForMaskedLM,
    contestant: Contestant,
    scored: Scored,
    relatives: int,
    batch_tokens: int = 4096,
) -> dict[str, float]:
    """Accuracy and perplexity of the hidden residues of the scored proteins.

    Args:
        model: The model.
        contestant: Its attention and positions.
        scored: The proteins.
        relatives: Number of relatives that each is read with.
        batch_tokens: Tokens of a batch, padding included; a longer row is one by itself.
    """
    rows, collator = scored.rows(relatives), scored.collator()
    metrics = ResidueMetrics(TOKENIZER)
    indices = sorted(scored.indices, key=lambda index: (-int(rows.lengths[index]), index))
    with evaluation_mode(model):
        while indices:
            size = max(1, batch_tokens // int(rows.lengths[indices[0]]))
            batch = collator([rows[index] for index in indices[:size]])
            labels = batch.pop("labels")
            metrics.update(model(**inputs(batch, contestant)).logits, labels)
            indices = indices[size:]
    found = metrics.compute()
    return {name: found[name] for name in ("accuracy", "perplexity", "tokens")}


def train(
    contestant: Contestant,
    shape: Shape,
    rows: FamilyRows,
    scored: Scored,
    relatives: int,
    seed: int,
    *,
    model: PerformerForMaskedLM | None = None,
) -> tuple[PerformerForMaskedLM, list[dict[str, float]]]:
    """Train a model with AdamW, one cycle of the learning rate.

    Args:
        contestant: Its attention and positions.
        shape: Its size, and the number of steps.
        rows: Rows to train on.
        scored: Proteins to score every ``shape.every`` steps, with ``relatives`` relatives.
        relatives: See ``scored``.
        seed: Random seed of weights, order and masks.
        model: A model to go on with; a new one when None.

    Returns:
        The model, and of each scoring ``step``, ``cpu_seconds`` of training, ``loss`` (mean since
        the last), and the scores.
    """
    model = make_model(contestant, shape, seed) if model is None else model
    collator = MaskedCollator(TOKENIZER, seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), shape.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, shape.learning_rate, shape.steps + 1, pct_start=0.1
    )
    sampler = LengthBucketedBatchSampler(
        rows.lengths, max_tokens=shape.batch_tokens, seed=seed, num_batches=shape.steps
    )
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    seconds = 0.0
    for step, keys in enumerate(sampler, start=1):
        started = time.process_time()
        batch = collator([rows[key] for key in keys])
        optimizer.zero_grad()
        loss = model(**inputs(batch, contestant)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds += time.process_time() - started
        if step % shape.every == 0 or step == shape.steps:
            curve.append(
                {
                    "step": step,
                    "cpu_seconds": seconds,
                    "loss": sum(losses) / len(losses),
                    **score(model, contestant, scored, relatives),
                }
            )
            losses = []
            found = curve[-1]
            note(f"  step {step}, {found['cpu_seconds']:.0f} s: {found['accuracy']:.3f}")
    return model, curve
