"""Numbers of a model's attention: similarity against BLOSUM matrices, scores of heads and sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.mantel import compare_matrices, load_reference_matrix
from performers.proteins.reading.similarity import pair_ranks, top_pairs

MATRICES = ("BLOSUM62", "BLOSUM45", "BLOSUM80")
"""Substitution matrices that similarity is compared with: the usual one, of distant relatives, of
close ones."""

_TOP_PAIRS = 12


def learnt_numbers(analysis: ModelAnalysis, *, permutations: int = 9_999) -> dict[str, Any]:
    """Collect what the attention of one model shows, as plain numbers for JSON.

    `permutations` is the number of relabellings in each Mantel test.

    Returns:
        A dictionary, None in the place of numbers that are not finite:

        - `protein`: `name`, `length`, `read` (residues);
        - `problem`: why there is no attention, or empty;
        - `heads`, `uniform`, `band`: the fields of `HeadScores`;
        - `sites`: the result of `score_sites`, or None;
        - `similarity`, or None: `sequences`, `available`, `cropped`, `residues`, `threshold`, and
          for `all` attention and what is `thresholded`: number of `heads` used, `matrices` (name
          to the result of `compare_matrices`), `top_pairs`, `expected_pairs` with their rank,
          `notes`, and the (20, 20) `matrix` in the order of `amino_acids`;
        - `embeddings`: the same `matrices`, `top_pairs`, `expected_pairs` and `matrix` of
          the amino acids' input embeddings; see `embedding_similarity`.
    """
    references = {name: load_reference_matrix(name, AMINO_ACIDS) for name in MATRICES}

    def numbers_of(matrix: NDArray[np.float64]) -> dict[str, Any]:
        """Agreement of a (20, 20) similarity with substitution matrices, and pairs."""
        return {
            "matrices": {
                name: compare_matrices(matrix, reference, name=name, permutations=permutations)
                for name, reference in references.items()
            },
            "top_pairs": top_pairs(matrix, _TOP_PAIRS),
            "expected_pairs": pair_ranks(matrix),
            "matrix": matrix.tolist(),
        }

    protein, scores, kinds = analysis.protein, analysis.scores, analysis.similarity
    numbers: dict[str, Any] = {
        "protein": {
            "name": protein.name,
            "length": len(protein.sequence),
            "read": len(analysis.labels),
        },
        "problem": analysis.problem,
        **(asdict(scores) if scores else {"heads": [], "uniform": None, "band": None}),
        "sites": analysis.sites,
        "similarity": None,
        "embeddings": numbers_of(analysis.embeddings),
    }
    if kinds:
        numbers["similarity"] = {
            "sequences": analysis.sequences,
            "available": analysis.available,
            "cropped": analysis.cropped,
            "residues": int(kinds["all"].occurrences.sum()),
            "threshold": kinds["thresholded"].threshold,
            "amino_acids": AMINO_ACIDS,
            **{
                kind: {"heads": read.heads(), "notes": read.notes(), **numbers_of(read.matrix())}
                for kind, read in kinds.items()
            },
        }
    return dict(finite(numbers))


def finite(content: Any) -> Any:
    """The same content for JSON: None in the place of NaN and infinities, text of other objects."""
    if isinstance(content, Mapping):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    if content is None or isinstance(content, (bool, int, str)):
        return content
    if not isinstance(content, Real):
        return str(content)
    return float(content) if math.isfinite(content) else None
