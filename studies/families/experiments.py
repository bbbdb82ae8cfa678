"""The experiments with models: copying from a synthetic relative, and real families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from performers.app.files import replacement
from performers.cli.console import note
from performers.proteins.embedded import READS_RELATIVES, model_folder
from performers.proteins.inputs.families import FamilyRows, ProteinFamilies
from performers.proteins.model_folder import load_model
from studies.families.ceiling import measure_ceiling
from studies.families.scored import Scored, draw_scored
from studies.families.synthetic import synthetic_families
from studies.families.training import CONTESTANTS, Shape, make_model, score, train
from studies.parts import Part

REAL = ("features, window over positions", "exact", "features, listed keys")
"""Contestants that are trained on real families."""

_LENGTH = 40
# The families to score on are drawn with another seed than those to train on.
_SCORED_SEED = 1_000_000
# Families without relatives teach nothing of them.
_LEAST_MEMBERS = 8


def copying_scored(count: int, seed: int) -> Scored:
    """Synthetic proteins with one relative each."""
    drawn = synthetic_families(count, length=_LENGTH, seed=_SCORED_SEED + seed)
    return draw_scored(drawn, count, 1, 4 * _LENGTH, seed)


def copying(name: str, shape: Shape, scored: Scored, seed: int, folder: Path) -> Part:
    """Train on pairs of relatives of 80% identity; the weights are kept for `real_families`.

    Returns:
        ``curve``, see `train`, and ``alone``: scores without the relative.
    """
    note(f"copying: {name}, seed {seed}")
    # As many as the training reads; each is two rows of two members.
    families = -(-shape.steps * shape.batch_tokens // (4 * _LENGTH))
    drawn = synthetic_families(families, length=_LENGTH, seed=seed)
    rows = FamilyRows(drawn, max_length=8 * _LENGTH, seed=seed)
    model, curve = train(CONTESTANTS[name], shape, rows, scored, 1, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with replacement(_weights_file(folder, name, seed)) as file:
        torch.save(model.state_dict(), file)
    return {"curve": curve, "alone": score(model, CONTESTANTS[name], scored, 0)}


def _weights_file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}, seed {seed}.pt"


def training_rows(proteins: ProteinFamilies, max_length: int, seed: int) -> FamilyRows:
    """Rows of the proteins whose families have eight members or more."""
    names, counts = np.unique(np.array(proteins.names), return_counts=True)
    large = set(names[counts >= _LEAST_MEMBERS].tolist())
    kept = [index for index, name in enumerate(proteins.names) if name in large]
    chosen = ProteinFamilies(
        [np.array(proteins.tokens[index]) for index in kept],
        [proteins.names[index] for index in kept],
    )
    return FamilyRows(chosen, max_length=max_length, seed=seed)


def real_families(
    name: str,
    shape: Shape,
    seed: int,
    proteins: ProteinFamilies,
    scored: Scored,
    relatives: Sequence[int],
    max_length: int,
    folder: Path,
) -> Part:
    """Train on families of a corpus, and score on held-out ones by number of relatives.

    The model begins with the weights that `copying` kept.

    Returns:
        ``curve``, see `train` (one relative), and ``scores`` by number of relatives of ``corpus``.
    """
    note(f"families: {name}, seed {seed}")
    contestant = CONTESTANTS[name]
    model = make_model(contestant, shape, seed)
    model.load_state_dict(torch.load(_weights_file(folder, name, seed), weights_only=True))
    rows = training_rows(proteins, max_length, seed)
    quick = replace(scored, indices=scored.indices[:30])
    model, curve = train(contestant, shape, rows, quick, relatives[1], seed, model=model)
    scores = {str(k): score(model, contestant, scored, k) for k in relatives}
    note(f"  {[round(x['accuracy'], 3) for x in scores.values()]}")
    return {"curve": curve, "scores": {"corpus": scores}}


def included(scored: Scored, relatives: Sequence[int]) -> Part:
    """Score the model of the package by number of relatives, and the ceiling.

    Returns:
        That of `measure_ceiling`, and ``model``: scores by number of relatives.
    """
    note(f"{READS_RELATIVES}: {len(scored.indices)} proteins")
    model, _ = load_model(model_folder(READS_RELATIVES), device="cpu", dtype="float32")
    scores = {str(k): score(model, CONTESTANTS["exact"], scored, k) for k in relatives}
    note(f"  {[round(x['accuracy'], 3) for x in scores.values()]}")
    return {**measure_ceiling(scored, relatives), "model": scores}
