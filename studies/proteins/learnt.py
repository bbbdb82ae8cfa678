"""Several models' attention on the same proteins, in numbers and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.figures import save_figure
from performers.app.files import write_atomically
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.reading.analysis import analyse_model
from performers.proteins.reading.learnt import learnt_numbers
from studies.proteins.figures import attention_maps_figure, heads_figure, similarity_picture


def compare_learnt(
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    sequences: Sequence[str],
    protein: ProteinRecord,
    folder: Path,
    *,
    max_sequences: int,
    max_length: int,
    progress: Callable[[str, int, int], None],
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
    figures: dict[str, str] = {}
    similarities = {x: y.similarity["all"].matrix() for x, y in analyses.items() if y.similarity}
    if similarities:
        figures["similarity"] = "similarity.png"
        write_atomically(folder / "similarity.png", similarity_picture(similarities))
    scores = {name: found.scores for name, found in analyses.items() if found.scores is not None}
    if scores:
        figures["heads"] = save_figure(heads_figure(scores), folder / "heads.png").name
    for name, found in analyses.items():
        if found.labels:
            stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            figure = attention_maps_figure(found, f"{name}: {found.protein.name}")
            file = save_figure(figure, folder / f"attention-{stem}.png")
            figures[f"attention, {name}"] = file.name
    return {"models": {x: learnt_numbers(y) for x, y in analyses.items()}, "figures": figures}
