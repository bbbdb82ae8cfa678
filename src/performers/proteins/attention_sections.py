"""The sections of the report on attention: maps by head, and amino-acid similarity."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from performers.proteins import html_page as page
from performers.proteins.analysis import ModelAnalysis
from performers.proteins.figure_files import Pictures
from performers.proteins.figures import attention_maps_figure, similarity_figure
from performers.proteins.head_scores import COLUMN_FRACTION, HeadScore, HeadScores
from performers.proteins.mantel import load_reference_matrix
from performers.proteins.similarity import AMINO_ACIDS, AttentionSimilarity

_LAYERS_AT_MOST = 12
_LISTED_HEADS = 3
_LISTED_PAIRS = 12
_SIGNIFICANT = 0.05


def attention_section(analysis: ModelAnalysis, stem: str, pictures: Pictures) -> str:
    """Attention maps of one protein by layer and head, with a guide to reading them.

    Args:
        analysis: What was read from the model.
        stem: Name of the picture, without suffix.
        pictures: Where the picture goes.

    Returns:
        The markup.
    """
    protein = analysis.protein
    parts = [page.heading(3, f"Attention maps: {protein.name}")]
    if protein.description:
        parts.append(page.paragraph(protein.description, soft=True))
    if analysis.problem or not analysis.labels:
        reason = analysis.problem or "This protein has no residue that the tokenizer knows."
        return "".join([*parts, page.paragraph(reason)])
    whole, shown = len(protein.sequence), len(analysis.labels)
    size = f"All {whole:,} residues" if shown == whole else f"{shown:,} of {whole:,} residues"
    parts.append(
        page.paragraph(
            f"{size} are shown, without special tokens. Attention matrices grow with the square "
            f"of the length, so of each protein only the first {analysis.max_length:,} tokens are "
            f"read here, special tokens included."
        )
    )
    layers = _spread(len(analysis.maps), _LAYERS_AT_MOST)
    if len(layers) < len(analysis.maps):
        parts.append(
            page.paragraph(
                f"{len(layers)} of {len(analysis.maps)} layers are drawn; all are scored."
            )
        )
    figure = attention_maps_figure(
        [analysis.maps[layer - 1] for layer in layers],
        analysis.labels,
        scores=analysis.scores,
        layers=layers,
    )
    caption = (
        "One panel per head, headed by layer.head; dark is much attention. Each row of a panel is "
        "a residue that attends, each column a residue that is attended to."
    )
    if analysis.scores is not None:
        caption += (
            f" Then the mean distance of attention in residues, and its share within "
            f"{analysis.scores.band} residues."
        )
    parts.append(page.image(pictures.add(stem, figure), "Attention map of every head.", caption))
    if analysis.scores is not None:
        parts.append(_reading_guide(analysis.scores))
    return "".join(parts)


def similarity_section(
    analysis: ModelAnalysis,
    stem: str,
    pictures: Pictures,
    *,
    matrix_name: str = "BLOSUM62",
    permutations: int = 9_999,
) -> str:
    """Amino-acid similarity from attention beside a substitution matrix.

    Args:
        analysis: What was read from the model.
        stem: Name of the picture, without suffix.
        pictures: Where the picture goes.
        matrix_name: The substitution matrix.
        permutations: Number of relabellings in the Mantel test.

    Returns:
        The markup; nothing where the model returned no attention, which `attention_section` says.

    Raises:
        ValueError: If the matrix is unknown.
    """
    similarity = analysis.similarity
    if similarity is None:
        return ""
    names = {False: "All attention", True: f"Attention above {similarity.threshold:g}"}
    comparisons = {
        kind: similarity.compare(matrix_name, thresholded=kind, permutations=permutations)
        for kind in names
    }
    drawn = f" of {analysis.available:,}" if analysis.available > analysis.sequences else ""
    residues = int(similarity.occurrences.sum())
    parts = [
        page.heading(3, "Amino-acid similarity from attention"),
        page.paragraph(
            "For every head, the share of its attention that each amino acid receives; two amino "
            "acids are alike when the heads rise and fall together on them (Pearson correlation "
            "over the heads; Vig et al. 2020, Choromanski et al. 2021). "
            f"Read from {analysis.sequences:,}{drawn} sequences, {residues:,} residues "
            f"after cropping {analysis.cropped:,} of them to {analysis.max_length:,} tokens."
        ),
        page.table(
            ("counted", "heads", "Pearson r", "Spearman ρ", "Mantel p", "pairs"),
            [
                (
                    names[kind],
                    similarity.heads(thresholded=kind),
                    page.number(result.pearson, 3),
                    page.number(result.spearman, 3),
                    page.number(result.p_value, 4),
                    result.pairs,
                )
                for kind, result in comparisons.items()
            ],
            caption=f"Agreement with {matrix_name} off the diagonal. p: one-sided, "
            f"{permutations:,} relabellings of the amino acids.",
        ),
    ]
    for kind, result in comparisons.items():
        remarks = [*similarity.notes(thresholded=kind), *([result.note] if result.note else [])]
        parts.append(page.paragraph(f"{names[kind]}: {_verdict(result.p_value, matrix_name)}"))
        parts.append(page.bullets(remarks))
    matrices = {names[kind]: similarity.similarity(thresholded=kind) for kind in names}
    matrices = {name: matrix for name, matrix in matrices.items() if np.isfinite(matrix).any()}
    reference = load_reference_matrix(matrix_name, AMINO_ACIDS)
    if matrices:
        figure = similarity_figure(matrices, reference, reference_name=matrix_name)
        caption = (
            "Blue: alike; orange: unlike; grey: not compared. The amino acids stand in "
            "physicochemical groups: sulfhydryl, small, acid and amide, basic, aliphatic, aromatic."
        )
        description = f"Similarity of the twenty amino acids beside {matrix_name}."
        parts.append(page.image(pictures.add(stem, figure), description, caption))
        parts.append(_top_pairs(similarity, reference, matrix_name))
    return "".join(parts)


def _reading_guide(scores: HeadScores) -> str:
    uniform = scores.uniform
    heads = [head for head in scores.heads if math.isfinite(head.mean_distance)]
    local = sum(head.band_share >= 2 * uniform.band_share for head in heads)
    spread = sum(head.mean_distance >= 0.9 * uniform.mean_distance for head in heads)
    vertical = sum(head.column_share >= 2 * uniform.column_share for head in heads)
    top = f"{COLUMN_FRACTION:.0%}"
    kinds = (
        ("most local", scores.most_local(_LISTED_HEADS)),
        ("most global", scores.most_global(_LISTED_HEADS)),
        ("most vertical", scores.most_vertical(_LISTED_HEADS)),
    )
    rows = [(kind, head.label, *_score_cells(head)) for kind, listed in kinds for head in listed]
    rows.append(("uniform attention", "", *_score_cells(uniform)[:3], "–"))
    parts = [
        page.paragraph(f"How to read the maps of these {len(heads)} heads:"),
        page.bullets(
            [
                f"A dark diagonal is a local head: residues look at their neighbours. {local} put "
                f"at least twice the share of uniform attention within {scores.band} residues.",
                f"An even panel, or dark far from the diagonal, is a global head. {spread} reach "
                f"at least 90% of the mean distance of uniform attention.",
                f"Dark columns are a vertical head: all residues look at the same few. {vertical} "
                f"give the {top} most attended residues at least twice what uniform attention "
                f"gives them.",
                "Attention shows where a head reads, not how much the answer depends on it.",
            ]
        ),
        page.table(
            (
                "heads",
                "layer.head",
                "mean distance",
                f"within ±{scores.band}",
                f"to the top {top}",
                "to special tokens",
            ),
            rows,
            names=2,
            caption="Attention between residues; the last column is what leaves them.",
        ),
    ]
    if len(heads) < len(scores.heads):
        idle = len(scores.heads) - len(heads)
        parts.append(page.paragraph(f"{idle} heads pay no attention to residues: no score."))
    return "".join(parts)


def _score_cells(head: HeadScore) -> tuple[str, str, str, str]:
    return (
        page.number(head.mean_distance, 1),
        page.percent(head.band_share, 1),
        page.percent(head.column_share, 1),
        page.percent(head.special_share, 1),
    )


def _verdict(p_value: float, matrix_name: str) -> str:
    if not math.isfinite(p_value):
        return f"no comparison with {matrix_name} could be made."
    if p_value <= _SIGNIFICANT:
        return (
            f"agrees with {matrix_name} more than relabelled amino acids do (p = {p_value:.4f}): "
            f"the heads treat alike what evolution exchanges."
        )
    return (
        f"agrees with {matrix_name} no more than relabelled amino acids may by chance "
        f"(p = {p_value:.4f})."
    )


def _top_pairs(
    similarity: AttentionSimilarity, reference: NDArray[np.float64], matrix_name: str
) -> str:
    order = {letter: index for index, letter in enumerate(AMINO_ACIDS)}
    listed = [similarity.top_pairs(_LISTED_PAIRS, thresholded=kind) for kind in (False, True)]
    rows = []
    for rank in range(max(map(len, listed))):
        row: list[object] = [rank + 1]
        for pairs in listed:
            if rank >= len(pairs):
                row += ["–", "–", "–"]
                continue
            first, second, value = pairs[rank]
            score = reference[order[first], order[second]]
            row += [f"{first}–{second}", page.number(value, 3), f"{score:+g}" if score else "0"]
        rows.append(row)
    kinds = ("all", f"above {similarity.threshold:g}")
    header = [cell for kind in kinds for cell in (f"pair ({kind})", "similarity", matrix_name)]
    return page.table(["", *header], rows, caption="The most similar pairs of amino acids.")


def _spread(count: int, most: int) -> list[int]:
    """Numbers from 1 to `count`, at most `most` of them, evenly spread, both ends included."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})
