"""Training of small models on rows of relatives, and their scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import studies.comparators  # noqa: F401  (registers favor-listed)
from performers.cli.console import note
from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.objectives import MaskedCollator
from performers.proteins.inputs.packing import LengthBucketedBatchSampler
from performers.proteins.scoring.batches import evaluation_mode
from performers.proteins.scoring.evaluation import ResidueMetrics
from studies.families.ceiling import AlignedRows
from studies.families.scored import TOKENIZER, Scored
from studies.training import descend

# Tokens of a batch in scoring, padding included; a longer row is one by itself.
_SCORED_TOKENS = 4096


@dataclass(frozen=True)
class Contestant:
    """A model's attention.

    Attributes:
        config: Options of the configuration.
        restart: Positions restart in each member; otherwise they count through the row.
    """

    config: dict[str, Any]
    restart: bool = True


def _features(keys: int = 0, *, learned: bool = False) -> Contestant:
    options = {"window": 8, "keys": keys, "lists": 16, "per_head": False, "learned": learned}
    return Contestant({"attention": "favor-listed", "attention_options": options})


CONTESTANTS = {
    "exact": Contestant({"attention": "exact"}),
    "features": _features(),
    "features, window over positions": Contestant(
        {"attention": "favor-softmax", "window": 8, "position_window": 8}
    ),
    "exact, positions of the row": Contestant({"attention": "exact"}, restart=False),
    "learned features": _features(learned=True),
    "features, listed keys": _features(16),
}
"""Attentions by name; all but the exact ones have a window of 8 tokens in the row."""


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its training."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_features: int = 64
    steps: int = 1000
    batch_tokens: int = 4096
    learning_rate: float = 3e-3


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
    *,
    aligned: bool = False,
) -> dict[str, float]:
    """Accuracy and perplexity of the hidden residues of proteins read with relatives.

    Relatives are read as they are, or ``aligned``, see `AlignedRows`.
    """
    rows = AlignedRows(scored, relatives) if aligned else scored.rows(relatives)
    collator = scored.collator()
    metrics = ResidueMetrics(TOKENIZER)
    indices = sorted(scored.indices, key=lambda index: (-int(rows.lengths[index]), index))
    with evaluation_mode(model):
        while indices:
            size = max(1, _SCORED_TOKENS // int(rows.lengths[indices[0]]))
            batch = collator([rows[index] for index in indices[:size]])
            labels = batch.pop("labels")
            metrics.update(model(**inputs(batch, contestant)).logits, labels)
            indices = indices[size:]
    found = metrics.compute()
    return {name: found[name] for name in ("accuracy", "perplexity", "tokens")}


def train(
    model: PerformerForMaskedLM,
    contestant: Contestant,
    shape: Shape,
    rows: FamilyRows,
    scored: Scored,
    relatives: int,
    seed: int,
) -> list[dict[str, float]]:
    """Train with AdamW, one cycle of the learning rate.

    Returns:
        Of each scoring ``step``, ``cpu_seconds`` of training, ``loss`` (mean since the last), and
        the scores.
    """
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
        loss = model(**inputs(batch, contestant)).loss
        losses.append(descend(loss, optimizer, schedule, clip=1.0))
        seconds += time.process_time() - started
        if step % max(1, shape.steps // 4) == 0 or step == shape.steps:
            mean, losses = fmean(losses), []
            found = score(model, contestant, scored, relatives)
            curve.append({"step": step, "cpu_seconds": seconds, "loss": mean, **found})
            note(f"  step {step}, {seconds:.0f} s: {found['accuracy']:.3f}")
    return curve
