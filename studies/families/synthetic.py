"""Families of random ancestors: members differ by substitutions, insertions and deletions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from performers.proteins.inputs.families import ProteinFamilies
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, residue_ids
from studies.families.scored import TOKENIZER

_RESIDUES = residue_ids(TOKENIZER, AMINO_ACIDS).astype(np.int16)


def synthetic_families(
    count: int,
    *,
    members: int = 2,
    length: int = 60,
    identity: float = 0.8,
    gaps: float = 0.02,
    seed: int = 0,
) -> ProteinFamilies:
    """Draw families.

    An ancestor has uniform residues and 0.8 to 1.2 times ``length`` of them. A member has each
    residue replaced with probability ``1 - sqrt(identity)`` by another one, so that two members
    agree at about ``identity`` of their places; then before each residue, with probability
    ``gaps``, one or more residues are put in or taken out, with equal chances (lengths are
    geometric with mean 2).
    """
    random = np.random.default_rng(seed)
    tokens, names = [], []
    for family in range(count):
        size = int(random.integers(round(0.8 * length), round(1.2 * length) + 1))
        ancestor = random.integers(20, size=size)
        for _ in range(members):
            changed = random.random(size) >= identity**0.5
            member = np.where(changed, (ancestor + random.integers(1, 20, size)) % 20, ancestor)
            residues = _RESIDUES[_with_gaps(member, gaps, random)]
            ends = (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
            tokens.append(np.concatenate(([ends[0]], residues, [ends[1]])).astype(np.int16))
            names.append(f"f{family}")
    return ProteinFamilies(tokens, names)


def _with_gaps(
    residues: npt.NDArray[np.int64], gaps: float, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    pieces, start = [], 0
    for place in np.flatnonzero(random.random(residues.size) < gaps).tolist():
        if place < start:
            continue
        pieces.append(residues[start:place])
        start = place
        number = int(random.geometric(0.5))
        if random.random() < 0.5:
            start = place + number
        else:
            pieces.append(random.integers(20, size=number))
    pieces.append(residues[start:])
    return np.concatenate(pieces)
