"""The experiments with models: copying from a relative, real families, time of one long row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from performers.app.files import replacement
from performers.benchmark.memory import run_apart
from performers.cli.console import note
from performers.proteins.embedded import READS_RELATIVES, model_folder
from performers.proteins.inputs.families import FamilyRows, ProteinFamilies
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, residue_ids
from performers.proteins.model_folder import load_model
from performers.proteins.scoring.batches import evaluation_mode
from studies.families.ceiling import measure_ceiling
from studies.families.scored import TOKENIZER, Scored, draw_scored, selected
from studies.families.synthetic import synthetic_families
from studies.families.training import CONTESTANTS, Shape, make_model, score, train
from studies.parts import Part
from studies.training import cost

REAL = ("features, window over positions", "exact", "features, listed keys")
"""Contestants that are trained on real families."""
MEMBER = 256
"""Tokens of a member, its begin and end included."""
MOST_EXACT = 16384
"""Most tokens of a row that exact attention reads, whose time grows with their square."""

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
    model = make_model(CONTESTANTS[name], shape, seed)
    curve = train(model, CONTESTANTS[name], shape, rows, scored, 1, seed)
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
    return FamilyRows(selected(proteins, kept), max_length=max_length, seed=seed)


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
    curve = train(model, contestant, shape, rows, quick, relatives[1], seed)
    scores = {str(k): score(model, contestant, scored, k) for k in relatives}
    note(f"  {[round(x['accuracy'], 3) for x in scores.values()]}")
    return {"curve": curve, "scores": {"corpus": scores}}


def included(scored: Scored, relatives: Sequence[int]) -> Part:
    """Score the model of the package by number of relatives, and the ceiling.

    Returns:
        That of `measure_ceiling`, and scores by number of relatives: ``model``, and ``aligned``
        with relatives in the places of the protein.
    """
    note(f"{READS_RELATIVES}: {len(scored.indices)} proteins")
    model, _ = load_model(model_folder(READS_RELATIVES), device="cpu", dtype="float32")
    part = measure_ceiling(scored, relatives)
    for name in ("model", "aligned"):
        read = partial(score, model, CONTESTANTS["exact"], scored, aligned=name == "aligned")
        part[name] = {str(k): read(k) for k in relatives}
        note(f"  {name}: {[round(x['accuracy'], 3) for x in part[name].values()]}")
    return part


def contexts(name: str, shape: Shape, tokens: int, seed: int) -> Part:
    """Read a row of random members of one length, in a process of its own, on one thread.

    Returns:
        ``tokens``, ``members``, ``cpu_seconds`` of one forward pass without gradients, and
        ``mebibytes``, the rise of memory to its peak.
    """
    note(f"contexts: {name}, {tokens:,} tokens")
    measure = partial(read_row, name=name, shape=asdict(shape), tokens=tokens, seed=seed)
    seconds, nbytes = run_apart(measure, threads=1)
    return {
        "attention": name,
        "tokens": tokens,
        "members": tokens // MEMBER,
        "cpu_seconds": seconds,
        "mebibytes": nbytes / 2**20,
    }


def read_row(name: str, shape: dict[str, Any], tokens: int, seed: int) -> tuple[float, int]:
    """Processor seconds of one forward pass, and the rise of memory in bytes."""
    model = make_model(CONTESTANTS[name], Shape(**shape), seed)
    residues = torch.from_numpy(residue_ids(TOKENIZER, AMINO_ACIDS))
    drawn = torch.randint(
        len(residues), (tokens // MEMBER, MEMBER), generator=torch.Generator().manual_seed(seed)
    )
    ids = residues[drawn]
    ids[:, 0], ids[:, -1] = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    positions = torch.arange(MEMBER).repeat(len(ids))[None]
    mask = torch.ones(1, ids.numel(), dtype=torch.int64)
    with evaluation_mode(model):
        return cost(lambda: model(ids.view(1, -1), position_ids=positions, attention_mask=mask))
