"""Several models' attention on the same proteins, in numbers and figures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.figures import save_figure
from performers.app.progress import Progress
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis, analyse_model
from performers.proteins.reading.learnt import MATRICES, learnt_numbers
from performers.proteins.reading.mantel import load_reference_matrix
from studies.proteins.attention_figure import attention_maps_figure
from studies.proteins.figures import heads_figure, similarity_figure


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
    """Read several models' attention on the same proteins.

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
        seed: Seed of the draw of sequences, of sites and of relabellings.
        progress: Called with the name of a model, the sequences done and the sequences in all.

    Returns:
        `models`: name to `learnt_numbers`; `figures`: what a figure shows (`similarity`, `heads`,
        `attention, <name>`) to its path.

    Raises:
        ValueError: `models` is empty, a number is too small or a matrix is unknown.
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


def _draw(
    analyses: Mapping[str, ModelAnalysis], folder: Path, matrix_name: str, sites: Sequence[int]
) -> dict[str, str]:
    drawn: dict[str, str] = {}
    similarities = {
        name: analysis.similarity["all"].matrix()
        for name, analysis in analyses.items()
        if analysis.similarity
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


def _named(progress: Callable[[str, int, int], None] | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total: progress(name, done, total)
