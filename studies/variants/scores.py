"""Rank correlations of measured effects with scores of substitutions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from performers.proteins.embedded import PRETRAINED, READS_RELATIVES
from performers.proteins.inputs.fasta import iter_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import Relatives, overlap_whole
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.model import ProteinModel, load
from performers.proteins.reading.mantel import load_reference_matrix
from performers.proteins.scoring.variants import Substitution
from studies.families.ceiling import aligned_residues, profile
from studies.pages import Table
from studies.parts import Part
from studies.variants.assays import ASSAYS

Variants = Sequence[tuple[Substitution]]
_PLACES = {letter: place for place, letter in enumerate(AMINO_ACIDS)}
_model = cache(load)


def measure(
    protein: ProteinRecord,
    folder: Path,
    relatives: Path | None,
    counts: Sequence[int],
    max_tokens: int,
) -> Part:
    """Spearman correlation of the measured effects in one protein with each score.

    Args:
        protein: One of ``proteins.fasta``.
        folder: Folder of the tables of ``ASSAYS``.
        relatives: FASTA file of ``performers data relatives``.
        counts: Numbers of relatives, those listed first; a protein may have fewer.
        max_tokens: Most tokens of a row of protein and relatives.

    Returns:
        ``variants`` and ``relatives``, their numbers, and ``correlations`` by score.
    """
    variants, effects = ASSAYS[protein.name].read(folder, protein.sequence)
    single, reader = _model(PRETRAINED), _model(READS_RELATIVES)
    scores = {
        "BLOSUM62": blosum_scores(variants),
        PRETRAINED: log_odds(single, protein, variants),
        READS_RELATIVES: log_odds(reader, protein, variants),
    }
    members = [] if relatives is None else read_relatives(relatives, protein)
    for count in counts if members else ():
        chosen = members[:count]
        scores[f"profile, {count}"] = profile_scores(
            protein.sequence, [member.sequence for member in chosen], variants
        )
        rows = reader.relatives(chosen, max_tokens)
        scores[f"{READS_RELATIVES}, {count}"] = log_odds(reader, protein, variants, rows)
    return {
        "variants": len(variants),
        "relatives": len(members),
        "correlations": {key: float(spearmanr(effects, found)[0]) for key, found in scores.items()},
    }


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Tables of the proteins, and of the correlations: a line for each score."""
    scores = dict.fromkeys(key for part in parts.values() for key in part["correlations"])
    rows = []
    for score in scores:
        name, _, count = score.partition(", ")
        found = {
            protein: part["correlations"][score]
            for protein, part in parts.items()
            if score in part["correlations"]
        }
        rows.append(
            {
                "score": name,
                "relatives": count or "0",
                **{protein: f"{value:.2f}" for protein, value in found.items()},
                "mean": f"{statistics.mean(found.values()):.2f}",
            }
        )
    proteins = (
        {
            "protein": name,
            "substitutions": f"{part['variants']:,}",
            "relatives": f"{part['relatives']:,}",
        }
        for name, part in parts.items()
    )
    return {"correlations": Table.of(rows), "proteins": Table.of(proteins)}


def read_relatives(path: Path, protein: ProteinRecord) -> list[ProteinRecord]:
    """Relatives of a protein in the order of the file, without those that hold it whole."""
    return [
        record
        for record in iter_fasta(path)
        if record.field("family") == protein.name
        and not overlap_whole(record.sequence, protein.sequence)
    ]


def blosum_scores(variants: Variants) -> list[float]:
    """Scores of the substitutions in BLOSUM62."""
    matrix = load_reference_matrix("BLOSUM62", AMINO_ACIDS)
    return [float(matrix[_PLACES[x.wild_type], _PLACES[x.mutant]]) for (x,) in variants]


def profile_scores(sequence: str, relatives: Sequence[str], variants: Variants) -> list[float]:
    """Log-odds of the profile of pairwise alignments; see `studies.families.ceiling.profile`."""
    letters = Counter("".join((sequence, *relatives)))
    frequencies = np.array([letters[letter] + 1.0 for letter in AMINO_ACIDS])
    frequencies /= frequencies.sum()
    aligned = [aligned_residues(sequence, relative) for relative in relatives]
    chances = [
        np.log(profile([(x[place], same) for x, same in aligned if place in x], frequencies))
        for place in range(len(sequence))
    ]
    return [
        float(chances[x.position - 1][_PLACES[x.mutant]])
        - float(chances[x.position - 1][_PLACES[x.wild_type]])
        for (x,) in variants
    ]


def log_odds(
    model: ProteinModel,
    protein: ProteinRecord,
    variants: Variants,
    relatives: Relatives | None = None,
) -> list[float]:
    """Log-odds of the substitutions under a model, the protein alone or after its relatives."""
    return [float(x) for x in model.variant_scorer(protein, relatives=relatives)(variants)]
