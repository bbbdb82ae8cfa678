"""Attention that known sites of a protein receive, such as those of its active centre."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from performers.app.errors import UserError
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.reading.head_scores import looks_causal

FEWEST_SETS = 20
"""With fewer possible sets no p-value could be as low as 0.05, so none is given."""


def parse_sites(text: str, length: int, *, source: str = "--sites") -> tuple[int, ...]:
    """Read distinct numbers of residues, rising, from a text such as `57,102,195`.

    `length` is the number of residues of the protein, `source` the origin of the text, for errors.

    Raises:
        UserError: An entry is not a number, or not that of a residue.
    """
    sites = set()
    for part in text.split(","):
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise UserError(
                f"{source} must be numbers of residues with commas between, such as 57,102,195; "
                f"got {part!r}"
            )
        sites.add(int(part))
    for site in sorted(sites):
        if not 1 <= site <= length:
            raise UserError(
                f"{source} must be residues of the protein, from 1 to {length}; got {site}"
            )
    return tuple(sorted(sites))


def header_sites(protein: ProteinRecord) -> tuple[int, ...]:
    """The sites that a protein's header names, as in `sites=57,102,195`; none if it does not.

    Raises:
        UserError: The sites are not residues of the protein.
    """
    found = protein.field("sites")
    if found is None:
        return ()
    source = f"sites= in the header of {protein.name}"
    return parse_sites(found, len(protein.sequence), source=source)


def score_sites(
    maps: Sequence[NDArray[np.floating[Any]]],
    labels: str,
    sites: Sequence[int],
    *,
    permutations: int = 9_999,
) -> dict[str, Any] | None:
    """Compare the attention that sites receive with uniform attention.

    With A the attention of one head between the n residues, site s receives the share
    Σ_i A_is / Σ_ij A_ij. Uniform attention gives each query's attention in equal parts to the
    residues that it may attend to: 1/n to each, or for a causal model 1/i from query i to the
    first i. The enrichment is the share over that of uniform attention.

    For a p-value, sets of as many residues are drawn at random, and the largest enrichment over
    the heads of each is compared with that of the sites: p = (1 + hits) / (1 + permutations). Sets
    are drawn twice, of all residues, and of residues with the same letters as the sites, of which
    there are Π_a C(n_a, k_a), with n_a residues of letter a in the protein and k_a among the
    sites. Read them with care for a causal model: the last residues are seen by few queries, so
    that little attention makes a large enrichment there.

    The best of many heads favours any residue, known or not. `typical` says how much, and both
    p-values take it into account. A head that favours an amino acid favours all its residues, and
    sites are often rare ones such as cysteine and histidine: `p_value` counts that as well;
    `same_letters_p_value` asks whether the sites stand out among their like.

    Args:
        maps: One array (heads, n, n) per layer, rows being queries.
        labels: The n residues as letters.
        sites: Numbers of residues, from 1.
        permutations: Number of sets drawn for each p-value.

    Returns:
        None when no site is among the n residues or no head attends to residues; else

        - `sites`: for each site `site`, its number from 1, and `residue`, its letter; `head`, the
          `layer.head` that favours it most, both from 1, with `share` and `enrichment` there;
          `mean_enrichment` over all heads; `rank` from 1 among the `residues`, by the enrichment in
          the best head of each;
        - `typical`: median over all residues of the enrichment in the best head of each;
        - `head`, `share`, `enrichment`: those of the head that gives the sites together most;
        - `p_value`, of sets of any residues; `same_letters_p_value`, NaN where fewer than
          `FEWEST_SETS` are possible; `same_letters_sets`, the number of those; `permutations`;
        - `beyond`: sites that lie beyond the residues that were read.
    """
    length = len(labels)
    within = sorted({site for site in sites if site <= length})
    if not within:
        return None
    received = np.concatenate([layer.sum(1, dtype=np.float64) for layer in maps])
    total = received.sum(1)
    used = np.isfinite(total) & (total > 0)
    if not used.any():
        return None
    names = [f"{n}.{h + 1}" for n, layer in enumerate(maps, 1) for h in range(layer.shape[0])]
    names = [name for name, keep in zip(names, used, strict=True) if keep]
    shares = received[used] / total[used, None]
    uniform = _uniform(maps, length)
    enrichment = shares / uniform
    best = enrichment.max(0)
    columns = np.array(within) - 1
    together = shares[:, columns].sum(1) / uniform[columns].sum()

    def p_value(pools: Sequence[tuple[NDArray[np.int64], int]]) -> float:
        generator = np.random.default_rng(0)
        hits = 0
        for _ in range(permutations):
            drawn = np.concatenate([generator.choice(pool, n, replace=False) for pool, n in pools])
            favoured = (shares[:, drawn].sum(1) / uniform[drawn].sum()).max()
            hits += bool(favoured >= together.max() - 1e-12)
        return (1 + hits) / (1 + permutations)

    letters = np.array(list(labels))
    like = [
        (np.flatnonzero(letters == letter), count)
        for letter, count in Counter(letters[columns].tolist()).items()
    ]
    possible = math.prod(math.comb(len(pool), count) for pool, count in like)
    first = int(together.argmax())
    return {
        "sites": [
            {
                "site": column + 1,
                "residue": labels[column],
                "head": names[head],
                "share": float(shares[head, column]),
                "enrichment": float(enrichment[head, column]),
                "mean_enrichment": float(enrichment[:, column].mean()),
                "rank": 1 + int((best > best[column]).sum()),
                "residues": length,
            }
            for column, head in zip(columns.tolist(), enrichment[:, columns].argmax(0), strict=True)
        ],
        "typical": float(np.median(best)),
        "head": names[first],
        "share": float(shares[first][columns].sum()),
        "enrichment": float(together[first]),
        "p_value": p_value([(np.arange(length), len(columns))]),
        "same_letters_p_value": p_value(like) if possible >= FEWEST_SETS else math.nan,
        "same_letters_sets": possible,
        "permutations": permutations,
        "beyond": [site for site in sites if site > length],
    }


def _uniform(maps: Sequence[NDArray[np.floating[Any]]], length: int) -> NDArray[np.float64]:
    """Share that each residue receives of uniform attention, (length,)."""
    if not looks_causal(maps):
        return np.full(length, 1.0 / length)
    from_each = np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]
    return np.asarray(from_each.sum(0) / length)
