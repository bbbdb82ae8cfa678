"""Several models' attention on the same proteins, in numbers and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.figures import save_figure
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis, analyse_model
from performers.proteins.reading.learnt import MATRICES, learnt_numbers
from performers.proteins.reading.mantel import load_reference_matrix
from studies.proteins.figures import attention_maps_figure, heads_figure, similarity_figure


def compare_learnt(
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    sequences: Sequence[str],
    protein: ProteinRecord,
    folder: Path,
    *,
    max_sequences: int,
    max_length: int,
    permutations: int = 9_999,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Read several models' attention on the same proteins.

    Returns:
        `models`: name to `learnt_numbers`; `figures`: what a figure shows (`similarity`, `heads`,
        `attention, <name>`) to the name of its file.
    """
    analyses = {
        name: analyse_model(
            model,
            tokenizer,
            sequences,
            protein=protein,
            max_sequences=max_sequences,
            max_length=max_length,
            progress=partial(progress, name),
        )
        for name, (model, tokenizer) in models.items()
    }
    numbers = {x: learnt_numbers(y, permutations=permutations) for x, y in analyses.items()}
    drawn = {}
    for name, figure in _figures(analyses).items():
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        drawn[name] = save_figure(figure, folder / f"{stem}.png").name
    return {"models": numbers, "figures": drawn}


def _figures(analyses: Mapping[str, ModelAnalysis]) -> dict[str, Figure]:
    made: dict[str, Figure] = {}
    similarities = {
        name: found.similarity["all"].matrix()
        for name, found in analyses.items()
        if found.similarity
    }
    if similarities:
        reference = load_reference_matrix(MATRICES[0], AMINO_ACIDS)
        made["similarity"] = similarity_figure(similarities, reference, MATRICES[0])
    scores = {name: found.scores for name, found in analyses.items() if found.scores is not None}
    if scores:
        made["heads"] = heads_figure(scores)
    for name, found in analyses.items():
        if found.maps and found.labels:
            title = f"{name}: {found.protein.name}"
            made[f"attention, {name}"] = attention_maps_figure(
                found.maps, found.labels, scores=found.scores, title=title
            )
    return made
