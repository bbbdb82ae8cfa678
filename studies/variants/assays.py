"""Published measurements of substitutions in proteins (deep mutational scans)."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from performers.app.errors import UserError
from performers.proteins.inputs.fasta import iter_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.scoring.variants import Substitution, check_variant, parse_variant

PROTEINS = Path(__file__).with_name("proteins.fasta")


@dataclass(frozen=True)
class Assay:
    """A table of variants of one protein with their measured effects.

    Attributes:
        file: Name of the table, comma- or tab-separated.
        variant: Column of the variants.
        effect: Column of the measurements; a larger one is a protein that works better.
        first: Number that the table gives the first residue of the protein.
    """

    file: str
    variant: str
    effect: str
    first: int

    def read(self, folder: Path, sequence: str) -> tuple[list[tuple[Substitution]], list[float]]:
        """Read the single substitutions and their effects, numbered from 1 in the protein.

        Stop codons, variants without a measurement and those with several substitutions are left
        out.

        Raises:
            UserError: The table is missing or lacks a column, or a variant is not one of the
                protein.
        """
        path = folder / self.file
        try:
            # Some tables begin with a byte order mark.
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        variants, effects = [], []
        for row in rows:
            try:
                name, effect = row[self.variant], float(row[self.effect] or "nan")
            except KeyError as error:
                raise UserError(f"{path} has no column {error}") from error
            if "," in name or name[-1] == "*" or name[0] == name[-1] or math.isnan(effect):
                continue
            number = int(name[1:-1]) - self.first + 1
            (substitution,) = parse_variant(f"{name[0]}{number}{name[-1]}")
            check_variant([substitution], sequence)
            variants.append((substitution,))
            effects.append(effect)
        return variants, effects


ASSAYS = {
    # Stiffler et al. 2015: growth with 2,500 ug/ml of ampicillin.
    "BLAT_ECOLX": Assay("BLAT_ECOLX_Ranganathan2015.csv", "mutant", "2500", 24),
    # McLaughlin et al. 2012: binding of the peptide CRIPT.
    "DLG4_RAT": Assay("DLG4_RAT_Ranganathan2012.csv", "mutant", "CRIPT", 311),
    # Melamed et al. 2013: growth of yeast.
    "PABP_YEAST": Assay("PABP_YEAST_Fields2013-singles.csv", "mutant", "log", 126),
    # Starita et al. 2013: ligase activity.
    "UBE4B_MOUSE": Assay("ube4b.tsv", "variant", "score", 0),
    # Romero et al. 2015: activity.
    "BGL3_STRSQ": Assay("bgl3.tsv", "variant", "score", 0),
    # Sarkisyan et al. 2016: fluorescence.
    "GFP_AEQVI": Assay("avgfp.tsv", "variant", "score", 0),
}
"""Measurements by the protein's name in ``proteins.fasta``."""


def proteins() -> list[ProteinRecord]:
    """The measured proteins, or the measured parts of them."""
    return list(iter_fasta(PROTEINS))
