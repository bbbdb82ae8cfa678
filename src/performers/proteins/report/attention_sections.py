"""The section of the report on attention maps: by head, with known sites."""

from __future__ import annotations

import math

from performers.app.figures import Pictures
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.head_scores import COLUMN_FRACTION, HeadScore, HeadScores
from performers.proteins.reading.site_scores import SiteScores
from performers.proteins.report import html_page as page
from performers.proteins.report.figures import attention_maps_figure

_LAYERS_AT_MOST = 12
_LISTED_HEADS = 3


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
        sites=[site.site for site in analysis.sites.sites] if analysis.sites else (),
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
    if analysis.sites is not None:
        caption += " Arrows at the upper and right edges mark the known sites."
    parts.append(page.image(pictures.add(stem, figure), "Attention map of every head.", caption))
    if analysis.sites is not None:
        parts.append(_sites(analysis.sites))
    if analysis.scores is not None:
        parts.append(_reading_guide(analysis.scores))
    return "".join(parts)


def _sites(scores: SiteScores) -> str:
    count = len(scores.sites)
    rows = [
        (
            f"{site.residue}{site.site}",
            site.head,
            page.percent(site.share, 2),
            f"{page.number(site.enrichment)}×",
            f"{page.number(site.mean_enrichment)}×",
            f"{site.rank} of {site.residues}",
        )
        for site in scores.sites
    ]
    parts = [
        page.table(
            ("site", "best head", "share", "over uniform", "mean of heads", "rank"),
            rows,
            names=2,
            caption="Attention between residues that each known site receives, in the head that "
            "gives it most. Rank: among all residues, each in its own best head.",
        ),
        page.paragraph(
            f"The best of many heads favours any residue: half of all residues receive at least "
            f"{page.number(scores.typical)} times uniform attention in theirs. Head {scores.head} "
            f"gives the {count} sites together most, {page.percent(scores.share)} of its attention "
            f"and {page.number(scores.enrichment)} times uniform. {_same_letters(scores)} Of "
            f"{scores.permutations:,} sets of {count} residues drawn whatever their letters, the "
            f"part is p = {scores.p_value:.4f}; that is small, too, where a head merely favours "
            "the amino acids that the sites are."
        ),
    ]
    if scores.beyond:
        listed = ", ".join(map(str, scores.beyond))
        parts.append(page.paragraph(f"Beyond the residues that were read: {listed}."))
    return "".join(parts)


def _same_letters(scores: SiteScores) -> str:
    if math.isnan(scores.same_letters_p_value):
        return (
            f"Sets of residues with the same letters, the sites' own included: "
            f"{scores.same_letters_sets}, too few to tell whether the sites stand out among their "
            "like."
        )
    return (
        f"Of {scores.permutations:,} sets of residues with the same letters drawn at random, some "
        f"head favours as much a part of p = {scores.same_letters_p_value:.4f}."
    )


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


def _spread(count: int, most: int) -> list[int]:
    """Numbers from 1 to `count`, at most `most` of them, evenly spread, both ends included."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})
