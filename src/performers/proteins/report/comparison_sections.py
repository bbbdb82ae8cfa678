"""The part of the report that puts what several models learnt side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from performers.app.figures import Pictures
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.learnt import KINDS
from performers.proteins.reading.mantel import load_reference_matrix
from performers.proteins.reading.similarity import AMINO_ACIDS
from performers.proteins.reading.site_scores import FEWEST_SETS
from performers.proteins.report import html_page as page
from performers.proteins.report.figures import similarity_figure
from performers.proteins.report.head_figure import heads_figure
from performers.proteins.report.similarity_sections import agreement_cells, rank_cell


def comparison_section(
    analyses: Mapping[str, ModelAnalysis],
    learnt: Mapping[str, Mapping[str, Any]],
    pictures: Pictures,
    *,
    matrix_name: str = "BLOSUM62",
) -> str:
    """Similarity, heads and known sites of several models.

    Args:
        analyses: Model name to what was read from it.
        learnt: Model name to the same in numbers; see `learnt_numbers`.
        pictures: Where the pictures go.
        matrix_name: The substitution matrix that is drawn.

    Returns:
        The markup; nothing when fewer than two models returned attention.
    """
    shown = {name: analysis for name, analysis in analyses.items() if analysis.scores is not None}
    if len(shown) < 2:
        return ""
    numbers = {name: learnt[name] for name in shown}
    return "".join(
        (
            page.heading(3, "What the models learnt, side by side"),
            _agreement(numbers),
            _expected_pairs(numbers),
            _similarities(shown, pictures, matrix_name),
            _heads(shown, pictures),
            _sites(numbers),
        )
    )


def _agreement(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    found = {name: n["similarity"] for name, n in numbers.items() if n["similarity"]}
    if not found:
        return ""
    first = next(iter(found.values()))
    counted = {"all": "attention", "thresholded": f"attention above {first['threshold']:g}"}
    rows = [
        (name, counted[kind], matrix, *agreement_cells(result))
        for kind in KINDS
        for matrix in first["all"]["matrices"]
        for name, similarity in found.items()
        for result in (similarity[kind]["matrices"][matrix],)
    ]
    rows += [
        (name, "embeddings", matrix, *agreement_cells(result))
        for name, n in numbers.items()
        if n["embeddings"]
        for matrix, result in n["embeddings"]["matrices"].items()
    ]
    return page.table(
        ("model", "read from", "matrix", "Pearson r", "p", "Spearman ρ", "p"),
        rows,
        names=3,
        caption="Agreement of amino-acid similarity with substitution matrices, off the diagonal. "
        "p: one-sided Mantel test.",
    )


def _expected_pairs(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    found = {name: n["similarity"]["all"] for name, n in numbers.items() if n["similarity"]}
    if not found:
        return ""
    rows = [
        (both[0]["pair"], *(rank_cell(pair) for pair in both))
        for both in zip(*(one["expected_pairs"] for one in found.values()), strict=True)
    ]
    top = ["most similar", *(", ".join(_listed(one)) for one in found.values())]
    return page.table(
        ("pair", *found),
        [*rows, top],
        names=1 + len(found),
        caption="Rank of pairs that one expects to be alike among all pairs, all attention.",
    )


def _listed(one: Mapping[str, Any]) -> list[str]:
    return [pair["pair"] for pair in one["top_pairs"][:6]]


def _similarities(shown: Mapping[str, ModelAnalysis], pictures: Pictures, matrix_name: str) -> str:
    matrices = {
        name: analysis.similarity.similarity()
        for name, analysis in shown.items()
        if analysis.similarity is not None
    }
    if not matrices:
        return ""
    reference = load_reference_matrix(matrix_name, AMINO_ACIDS)
    figure = similarity_figure(matrices, reference, reference_name=matrix_name)
    return page.image(
        pictures.add("similarities", figure),
        f"Similarity of the twenty amino acids in {', '.join(matrices)}, beside {matrix_name}.",
        "All attention. Blue: alike; orange: unlike; grey: not compared.",
    )


def _heads(shown: Mapping[str, ModelAnalysis], pictures: Pictures) -> str:
    scores = {name: found.scores for name, found in shown.items() if found.scores is not None}
    protein = next(iter(shown.values())).protein.name
    rows = []
    for name, found in scores.items():
        heads = [head for head in found.heads if math.isfinite(head.mean_distance)]
        local = sum(head.band_share >= 2 * found.uniform.band_share for head in heads)
        distance = median(head.mean_distance for head in heads) if heads else None
        band = median(head.band_share for head in heads) if heads else None
        rows.append(
            (
                name,
                f"{len(heads)} of {len(found.heads)}",
                page.number(distance, 1),
                page.number(found.uniform.mean_distance, 1),
                page.percent(band, 1),
                page.percent(found.uniform.band_share, 1),
                f"{local}",
            )
        )
    width = next(iter(scores.values())).band
    table = page.table(
        ("model", "heads", "distance", "uniform", f"within ±{width}", "uniform", "local heads"),
        rows,
        caption=f"Attention between the residues of {protein}: medians over the heads. Local "
        f"heads: at least twice the share of uniform attention within {width} residues.",
    )
    figure = heads_figure(scores)
    description = f"Mean distance and share near the diagonal of every head of {', '.join(scores)}."
    return table + page.image(pictures.add("heads", figure), description, "A dot for each head.")


def _sites(numbers: Mapping[str, Mapping[str, Any]]) -> str:
    found = {name: n["sites"] for name, n in numbers.items() if n["sites"]}
    if not found:
        return ""
    rows: list[tuple[str, ...]] = [
        (
            f"{both[0]['residue']}{both[0]['site']}",
            *(
                f"{s['enrichment']:.2f}× ({s['head']}), {s['rank']} of {s['residues']}"
                for s in both
            ),
        )
        for both in zip(*(one["sites"] for one in found.values()), strict=False)
    ]
    rows.append(("median residue", *(f"{one['typical']:.2f}×" for one in found.values())))
    together = (
        f"{one['enrichment']:.2f}× ({one['head']}), p = "
        f"{page.number(one['same_letters_p_value'], 4)}, of any letters {one['p_value']:.4f}"
        for one in found.values()
    )
    rows.append(("together", *together))
    return page.table(
        ("site", *found),
        rows,
        names=1 + len(found),
        caption="Attention that known sites receive over uniform attention, in the best head of "
        "each, and their rank among all residues. p: among sets drawn at random of residues with "
        f"the same letters, – where fewer than {FEWEST_SETS} are possible; then among sets of any "
        "letters, which is small, too, where a head merely favours the amino acids of the sites.",
    )
