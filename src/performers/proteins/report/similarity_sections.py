"""The sections of the report on amino-acid similarity, from attention and from embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from performers.app.figures import Pictures
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.learnt import KINDS
from performers.proteins.reading.mantel import load_reference_matrix
from performers.proteins.reading.similarity import AMINO_ACIDS
from performers.proteins.report import html_page as page
from performers.proteins.report.figures import similarity_figure

_SIGNIFICANT = 0.05
_COLOURS = (
    "Blue: alike; orange: unlike; grey: not compared. The amino acids stand in "
    "physicochemical groups: sulfhydryl, small, acid and amide, basic, aliphatic, aromatic."
)
_EXPECTED = "Pairs that one expects to be alike, among all pairs."


def similarity_section(
    analysis: ModelAnalysis,
    learnt: Mapping[str, Any],
    stem: str,
    pictures: Pictures,
    *,
    matrix_name: str = "BLOSUM62",
) -> str:
    """Amino-acid similarity from attention beside substitution matrices.

    Args:
        analysis: What was read from the model.
        learnt: The same in numbers; see `learnt_numbers`.
        stem: Name of the picture, without suffix.
        pictures: Where the picture goes.
        matrix_name: The substitution matrix that is drawn, one of those in the numbers.

    Returns:
        The markup; nothing where the model returned no attention, which `attention_section` says.
    """
    similarity, found = analysis.similarity, learnt["similarity"]
    if similarity is None:
        return ""
    names = {"all": "All attention", "thresholded": f"Attention above {similarity.threshold:g}"}
    drawn = f" of {analysis.available:,}" if analysis.available > analysis.sequences else ""
    compared = found["all"]["matrices"]
    parts = [
        page.heading(3, "Amino-acid similarity from attention"),
        page.paragraph(
            "For every head, the share of its attention that each amino acid receives; two amino "
            "acids are alike when the heads rise and fall together on them (Pearson correlation "
            "over the heads; Vig et al. 2020, Choromanski et al. 2021). "
            f"Read from {analysis.sequences:,}{drawn} sequences, {found['residues']:,} residues "
            f"after cropping {analysis.cropped:,} of them to {analysis.max_length:,} tokens."
        ),
        page.table(
            ("counted", "matrix", "heads", "Pearson r", "p", "Spearman ρ", "p", "pairs"),
            [
                (names[kind], name, found[kind]["heads"], *agreement_cells(result), result["pairs"])
                for kind in KINDS
                for name, result in found[kind]["matrices"].items()
            ],
            names=2,
            caption="Agreement with substitution matrices off the diagonal. p: one-sided Mantel "
            f"test, {compared[matrix_name]['permutations']:,} relabellings of the amino acids.",
        ),
    ]
    for kind in KINDS:
        result = found[kind]["matrices"][matrix_name]
        remarks = [*found[kind]["notes"], *([result["note"]] if result["note"] else [])]
        parts.append(
            page.paragraph(
                f"{names[kind]}: {_verdict(result['p_value'], matrix_name, 'the heads')}"
            )
        )
        parts.append(page.bullets(remarks))
    matrices = {names[kind]: similarity.similarity(thresholded=KINDS[kind]) for kind in KINDS}
    matrices = {name: matrix for name, matrix in matrices.items() if np.isfinite(matrix).any()}
    reference = load_reference_matrix(matrix_name, AMINO_ACIDS)
    if matrices:
        figure = similarity_figure(matrices, reference, reference_name=matrix_name)
        description = f"Similarity of the twenty amino acids beside {matrix_name}."
        parts.append(page.image(pictures.add(stem, figure), description, _COLOURS))
        parts.append(_top_pairs(found, reference, matrix_name))
        parts.append(_expected_pairs(found, names))
    return "".join(parts)


def embedding_section(
    analysis: ModelAnalysis,
    learnt: Mapping[str, Any],
    stem: str,
    pictures: Pictures,
    *,
    matrix_name: str = "BLOSUM62",
) -> str:
    """Amino-acid similarity of a model's input embeddings beside substitution matrices.

    Args:
        analysis: What was read from the model.
        learnt: The same in numbers; see `learnt_numbers`.
        stem: Name of the picture, without suffix.
        pictures: Where the picture goes.
        matrix_name: The substitution matrix that is drawn, one of those in the numbers.

    Returns:
        The markup; nothing without embeddings.
    """
    similarity, found = analysis.embeddings, learnt["embeddings"]
    if similarity is None:
        return ""
    result = found["matrices"][matrix_name]
    parts = [
        page.heading(3, "Amino-acid similarity from embeddings"),
        page.paragraph(
            "Cosines between the vectors by which the model reads the amino acids, their mean "
            "taken off. What is exchanged for one another in proteins stands in like surroundings, "
            "which is what these vectors are trained on."
        ),
        page.table(
            ("matrix", "Pearson r", "p", "Spearman ρ", "p", "pairs"),
            [
                (name, *agreement_cells(one), one["pairs"])
                for name, one in found["matrices"].items()
            ],
            caption="Agreement with substitution matrices off the diagonal. p: one-sided Mantel "
            f"test, {result['permutations']:,} relabellings of the amino acids.",
        ),
        page.paragraph(f"Embeddings: {_verdict(result['p_value'], matrix_name, 'the embeddings')}"),
        page.bullets([result["note"]] if result["note"] else []),
    ]
    if np.isfinite(similarity).any():
        reference = load_reference_matrix(matrix_name, AMINO_ACIDS)
        figure = similarity_figure(
            {"Embeddings": similarity}, reference, reference_name=matrix_name, unit="cosine"
        )
        description = f"Similarity of the embeddings of the twenty amino acids and {matrix_name}."
        parts.append(page.image(pictures.add(stem, figure), description, _COLOURS))
        most = ", ".join(pair["pair"] for pair in found["top_pairs"])
        rows = [
            (p["pair"], page.number(p["similarity"], 3), rank_cell(p))
            for p in found["expected_pairs"]
        ]
        parts.append(page.paragraph(f"Most similar: {most}."))
        parts.append(page.table(("pair", "similarity", "rank"), rows, caption=_EXPECTED))
    return "".join(parts)


def agreement_cells(result: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Pearson correlation, its p-value, Spearman correlation, its p-value, as text."""
    return (
        page.number(result["pearson"], 3),
        page.number(result["p_value"], 4),
        page.number(result["spearman"], 3),
        page.number(result["spearman_p_value"], 4),
    )


def rank_cell(pair: Mapping[str, Any]) -> str:
    """The rank of a pair among all pairs, as text."""
    return "–" if pair["rank"] is None else f"{pair['rank']} of {pair['of']}"


def _verdict(p_value: float | None, matrix_name: str, what: str) -> str:
    if p_value is None:
        return f"no comparison with {matrix_name} could be made."
    if p_value <= _SIGNIFICANT:
        return (
            f"agrees with {matrix_name} more than relabelled amino acids do (p = {p_value:.4f}): "
            f"{what} treat alike what evolution exchanges."
        )
    return (
        f"agrees with {matrix_name} no more than relabelled amino acids may by chance "
        f"(p = {p_value:.4f})."
    )


def _top_pairs(found: Mapping[str, Any], reference: NDArray[np.float64], matrix_name: str) -> str:
    listed = [found[kind]["top_pairs"] for kind in KINDS]
    rows = []
    for rank in range(max(map(len, listed))):
        row: list[object] = [rank + 1]
        for pairs in listed:
            row += _pair_cells(pairs, rank, reference)
        rows.append(row)
    kinds = ("all", f"above {found['threshold']:g}")
    header = [cell for kind in kinds for cell in (f"pair ({kind})", "similarity", matrix_name)]
    return page.table(["", *header], rows, caption="The most similar pairs of amino acids.")


def _pair_cells(
    pairs: Sequence[Mapping[str, Any]], rank: int, reference: NDArray[np.float64]
) -> list[str]:
    if rank >= len(pairs):
        return ["–", "–", "–"]
    first, second = pairs[rank]["pair"].split("–")
    score = reference[AMINO_ACIDS.index(first), AMINO_ACIDS.index(second)]
    value = page.number(pairs[rank]["similarity"], 3)
    return [pairs[rank]["pair"], value, f"{score:+g}" if score else "0"]


def _expected_pairs(found: Mapping[str, Any], names: Mapping[str, str]) -> str:
    rows = []
    for both in zip(*(found[kind]["expected_pairs"] for kind in KINDS), strict=True):
        cells = [c for pair in both for c in (page.number(pair["similarity"], 3), rank_cell(pair))]
        rows.append((both[0]["pair"], *cells))
    header = [cell for kind in KINDS for cell in (names[kind].lower(), "rank")]
    return page.table(("pair", *header), rows, caption=_EXPECTED)
