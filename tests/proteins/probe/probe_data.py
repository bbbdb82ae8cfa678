"""Labelled proteins whose labels depend on the order of residues, in families."""

import random

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS

MOTIFS = {"forward": "KD", "backward": "DK"}


def motif_records(count=240, families=40, seed=0, both=False):
    """Proteins with a motif or its reverse, which no composition tells apart.

    With `both`, a protein may have each of the two labels or none.
    """
    source = random.Random(seed)
    others = [letter for letter in AMINO_ACIDS if letter not in "KD"]
    records = []
    for number in range(count):
        chosen = (
            [m for m in MOTIFS if source.random() < 0.5] if both else [source.choice([*MOTIFS])]
        )
        parts = ["".join(source.choices(others, k=6)) for _ in range(5)]
        for _ in range(4):
            # A protein without a label has the residues apart.
            motif = MOTIFS[source.choice(chosen)] if chosen else "KAD"
            parts.insert(source.randrange(len(parts)), motif + source.choice(others))
        labels = f"labels={','.join(chosen)}" if chosen else "labels=,"
        family = f"family=f{source.randrange(families)}"
        records.append(ProteinRecord(f"p{number}", f"{labels} {family}", "".join(parts)))
    return records
