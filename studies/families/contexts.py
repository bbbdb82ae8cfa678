"""Processor time and memory of reading one long row of relatives."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from performers.benchmark.memory import run_apart
from performers.cli.console import note
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, residue_ids
from performers.proteins.scoring.batches import evaluation_mode
from studies.families.scored import TOKENIZER
from studies.families.training import CONTESTANTS, Shape, make_model
from studies.parts import Part
from studies.training import cost

MEMBER = 256
"""Tokens of a member, its begin and end included."""
MOST_EXACT = 16384
"""Most tokens of a row that exact attention reads, whose time grows with their square."""


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
