"""What models learnt, in numbers: similarity against BLOSUM matrices, head scores, known sites."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.figures import save_figure
from performers.proteins.inputs.fasta import ProteinRecord
from performers.proteins.reading.analysis import ModelAnalysis, analyse_model
from performers.proteins.reading.mantel import compare_matrices, load_reference_matrix
from performers.proteins.reading.similarity import (
    AMINO_ACIDS,
    EXPECTED_PAIRS,
    AttentionSimilarity,
    pair_ranks,
    top_pairs,
)
from performers.proteins.report.figures import attention_maps_figure, similarity_figure
from performers.proteins.report.head_figure import heads_figure

MATRICES = ("BLOSUM62", "BLOSUM45", "BLOSUM80")
"""Substitution matrices that similarity is compared with: the usual one, of distant relatives, of
close ones."""

TOP_PAIRS = 12
"""How many of the most similar pairs of amino acids are listed."""

KINDS = {"all": False, "thresholded": True}
"""Names of the two ways to count attention: all of it, and what is above the threshold."""


def learnt_numbers(
    analysis: ModelAnalysis,
    *,
    matrices: Sequence[str] = MATRICES,
    permutations: int = 9_999,
    seed: int = 0,
) -> dict[str, Any]:
    """What the attention of one model shows, as plain numbers for JSON.

    Args:
        analysis: What `analyse_model` returned.
        matrices: Substitution matrices of Biopython to compare similarity with.
        permutations: Number of relabellings in each Mantel test.
        seed: Seed of the relabellings.

    Returns:
        A dictionary, None in the place of numbers that are not finite:

        - `protein`: `name`, `length`, `read` (residues);
        - `problem`: why there is no attention, or empty;
        - `heads`, `uniform`, `band`: the fields of `HeadScores`;
        - `sites`: the fields of `SiteScores`, or None;
        - `similarity`, or None: `sequences`, `available`, `cropped`, `residues`, `threshold`, and
          for `all` attention and what is `thresholded`: number of `heads` used, `matrices` (name
          to the fields of `MatrixComparison`), `top_pairs`, `expected_pairs` with their rank,
          `notes`, and the (20, 20) `matrix` in the order of `amino_acids`;
        - `embeddings`, or None: the same `matrices`, `top_pairs`, `expected_pairs` and `matrix` of
          the amino acids' input embeddings; see `embedding_similarity`.

    Raises:
        ValueError: If a matrix is unknown.
    """
    protein = analysis.protein
    scores = analysis.scores
    numbers: dict[str, Any] = {
        "protein": {
            "name": protein.name,
            "length": len(protein.sequence),
            "read": len(analysis.labels),
        },
        "problem": analysis.problem,
        "heads": [asdict(head) for head in scores.heads] if scores else [],
        "uniform": asdict(scores.uniform) if scores else None,
        "band": scores.band if scores else None,
        "sites": asdict(analysis.sites) if analysis.sites else None,
        "similarity": None,
        "embeddings": None,
    }
    if analysis.embeddings is not None:
        numbers["embeddings"] = _matrix_numbers(analysis.embeddings, matrices, permutations, seed)
    similarity = analysis.similarity
    if similarity is not None:
        numbers["similarity"] = {
            "sequences": analysis.sequences,
            "available": analysis.available,
            "cropped": analysis.cropped,
            "residues": int(similarity.occurrences.sum()),
            "threshold": similarity.threshold,
            "amino_acids": AMINO_ACIDS,
            **{
                kind: _similarity_numbers(similarity, thresholded, matrices, permutations, seed)
                for kind, thresholded in KINDS.items()
            },
        }
    return dict(finite(numbers))


def compare_learnt(
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    sequences: Sequence[str],
    protein: ProteinRecord,
    *,
    sites: Sequence[int] = (),
    figures: str | os.PathLike[str] | None = None,
    matrices: Sequence[str] = MATRICES,
    max_sequences: int = 800,
    max_length: int = 512,
    batch_size: int = 4,
    band: int = 8,
    permutations: int = 9_999,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Reads several models' attention on the same proteins.

    Args:
        models: Name to a model and its tokenizer.
        sequences: Proteins behind the amino-acid similarity.
        protein: The protein whose attention is mapped.
        sites: Numbers, from 1, of its known sites.
        figures: Folder for the figures; None draws none.
        matrices: See `learnt_numbers`; the first is drawn.
        max_sequences: See `analyse_model`.
        max_length: See `analyse_model`.
        batch_size: See `analyse_model`.
        band: See `analyse_model`.
        permutations: See `learnt_numbers`.
        seed: Of the draw of sequences, of sites and of relabellings.
        progress: Called with the name of a model, the sequences done and the sequences in all.

    Returns:
        `models`: name to `learnt_numbers`; `figures`: what a figure shows (`similarity`, `heads`,
        `attention, <name>`) to its path.

    Raises:
        ValueError: If there is no model, a number is too small or a matrix is unknown.
    """
    if not models:
        raise ValueError("models must hold at least one model, got none")
    analyses = {}
    for name, (model, tokenizer) in models.items():
        analyses[name] = analyse_model(
            model,
            tokenizer,
            sequences,
            protein=protein,
            max_sequences=max_sequences,
            max_length=max_length,
            batch_size=batch_size,
            band=band,
            sites=sites,
            seed=seed,
            progress=_named(progress, name),
        )
    numbers = {
        name: learnt_numbers(analysis, matrices=matrices, permutations=permutations, seed=seed)
        for name, analysis in analyses.items()
    }
    drawn = {} if figures is None else _draw(analyses, Path(figures), matrices[0], sites)
    return {"models": numbers, "figures": drawn}


def finite(content: Any) -> Any:
    """The same dictionaries, lists and values, with None in the place of NaN and infinities."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    if isinstance(content, float):
        return float(content) if math.isfinite(content) else None
    return content


def _similarity_numbers(
    similarity: AttentionSimilarity,
    thresholded: bool,
    matrices: Sequence[str],
    permutations: int,
    seed: int,
) -> dict[str, Any]:
    matrix = similarity.similarity(thresholded=thresholded)
    return {
        "heads": similarity.heads(thresholded=thresholded),
        "notes": similarity.notes(thresholded=thresholded),
        **_matrix_numbers(matrix, matrices, permutations, seed),
    }


def _matrix_numbers(
    similarity: NDArray[np.float64], matrices: Sequence[str], permutations: int, seed: int
) -> dict[str, Any]:
    """Agreement of a (20, 20) similarity with substitution matrices, and pairs."""
    return {
        "matrices": {
            name: asdict(
                compare_matrices(
                    similarity,
                    load_reference_matrix(name, AMINO_ACIDS),
                    name=name,
                    permutations=permutations,
                    seed=seed,
                )
            )
            for name in matrices
        },
        "top_pairs": [
            {"pair": f"{pair.first}–{pair.second}", "similarity": pair.similarity}
            for pair in top_pairs(similarity, TOP_PAIRS)
        ],
        "expected_pairs": [
            {
                "pair": f"{pair.first}–{pair.second}",
                "similarity": pair.similarity,
                "rank": pair.rank,
                "of": pair.of,
            }
            for pair in pair_ranks(similarity, EXPECTED_PAIRS)
        ],
        "matrix": similarity.tolist(),
    }


def _draw(
    analyses: Mapping[str, ModelAnalysis], folder: Path, matrix_name: str, sites: Sequence[int]
) -> dict[str, str]:
    drawn: dict[str, str] = {}
    similarities = {
        name: analysis.similarity.similarity()
        for name, analysis in analyses.items()
        if analysis.similarity is not None
    }
    if similarities:
        reference = load_reference_matrix(matrix_name, AMINO_ACIDS)
        figure = similarity_figure(similarities, reference, reference_name=matrix_name)
        drawn["similarity"] = str(save_figure(figure, folder / "similarity.png"))
    scores = {name: found.scores for name, found in analyses.items() if found.scores is not None}
    if scores:
        drawn["heads"] = str(save_figure(heads_figure(scores), folder / "heads.png"))
    for number, (name, analysis) in enumerate(analyses.items(), start=1):
        if analysis.maps and analysis.labels:
            figure = attention_maps_figure(
                analysis.maps,
                analysis.labels,
                scores=analysis.scores,
                sites=sites,
                title=f"{name}: {analysis.protein.name}",
            )
            stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
            path = folder / f"attention-{number}-{stem}.png"
            drawn[f"attention, {name}"] = str(save_figure(figure, path))
    return drawn


def _named(
    progress: Callable[[str, int, int], None] | None, name: str
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)
