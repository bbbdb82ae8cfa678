"""Splits of a corpus: test by sequence, out-of-distribution by whole clusters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from performers.app.errors import UserError

Clusters = Mapping[str, Sequence[str]]
"""The members of each cluster, by its name (the representative's)."""


Relatives = Callable[[Sequence[str], Sequence[str], bool], Collection[str]]
"""Which of the first clusters have a member with a relative in the second ones; the last argument
says whether to look thoroughly, or quickly for the close ones."""

# A group of related clusters may exceed what is asked for by this much.
_GREATEST_SHARE = 1.2


def shuffled(names: Iterable[str], seed: int, draw: str) -> list[str]:
    """Names in an order that seed and draw alone fix, the same with every library version.

    Args:
        names: In any order.
        seed: Seed of all draws.
        draw: What is drawn. Two draws in one order would not be independent: what the first takes
            from the front is not left for the second.
    """
    return sorted(names, key=lambda n: hashlib.sha256(f"{seed}:{draw}:{n}".encode()).hexdigest())


def candidate_clusters(clusters: Clusters, seed: int, sequences: int, largest: int) -> list[str]:
    """The first clusters in shuffled order that together have so many sequences.

    Args:
        clusters: All of them.
        seed: Seed of the order.
        sequences: How many.
        largest: A cluster with more members is passed over: it alone would decide what out of
            distribution means.
    """
    chosen: list[str] = []
    total = 0
    for name in shuffled(clusters, seed, "clusters"):
        if total >= sequences:
            break
        if len(clusters[name]) <= largest:
            chosen.append(name)
            total += len(clusters[name])
    return chosen


def independent_clusters(
    candidates: Sequence[str], clusters: Clusters, relatives: Relatives
) -> list[str]:
    """Candidates without a relative among all that is not returned.

    A candidate with a relative outside is dropped, and is then outside itself, until a round drops
    none. A search never meets the candidates' own clusters, whose members would be the best hits
    of each other and leave no place for others.

    Args:
        candidates: Names of clusters.
        clusters: All clusters.
        relatives: Finds those with relatives.

    Returns:
        Names in the order of ``candidates``.
    """
    held, outside = list(candidates), []
    for thorough in (False, True):
        everything_else = _without(clusters, held)
        outside = list(relatives(held, everything_else, thorough)) if held else []
        held = _without(held, outside)
    while held and outside:
        outside = list(relatives(held, outside, True))
        held = _without(held, outside)
    return held


def _without(names: Iterable[str], dropped: Iterable[str]) -> list[str]:
    gone = set(dropped)
    return [name for name in names if name not in gone]


def whole_groups(
    candidates: Sequence[str],
    hits: Iterable[tuple[str, str]],
    clusters: Clusters,
    sequences: int,
) -> list[str]:
    """Candidates that make up a number of sequences, related ones together or not at all.

    Args:
        candidates: Names of clusters, in order of preference.
        hits: (member of a candidate, member of a candidate), all direct relations.
        clusters: All clusters.
        sequences: Stop once so many sequences are taken; a group that would exceed it by a fifth is
            passed over.

    Returns:
        Names in the order in which their groups come.
    """
    cluster_of = {member: name for name in candidates for member in clusters[name]}
    related: dict[str, set[str]] = {name: set() for name in candidates}
    for query, target in hits:
        ours, theirs = cluster_of[query], cluster_of[target]
        if ours != theirs:
            related[ours].add(theirs)
            related[theirs].add(ours)
    taken: list[str] = []
    seen: set[str] = set()
    total = 0
    for name in candidates:
        if total >= sequences:
            break
        if name in seen:
            continue
        group = _connected(name, related)
        seen |= group
        size = sum(len(clusters[member]) for member in group)
        if total + size <= _GREATEST_SHARE * sequences:
            taken += [candidate for candidate in candidates if candidate in group]
            total += size
    return taken


def _connected(start: str, related: Mapping[str, set[str]]) -> set[str]:
    group, edge = {start}, [start]
    while edge:
        new = related[edge.pop()] - group
        group |= new
        edge += new
    return group


def assign_splits(
    clusters: Clusters,
    held_out: Iterable[str],
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, list[str]]:
    """Names of the sequences of each split, sorted.

    ``ood`` is every member of the clusters held out; of the rest a fraction each, drawn by
    sequence, is ``validation`` and ``test``, and what is left is ``train``.

    Raises:
        UserError: A split would be empty.
    """
    ood = {member for name in held_out for member in clusters[name]}
    everything = [member for members in clusters.values() for member in members]
    order = shuffled((name for name in everything if name not in ood), seed, "sequences")
    validation = round(validation_fraction * len(everything))
    test = round(test_fraction * len(everything))
    splits = {
        "train": sorted(order[validation + test :]),
        "validation": sorted(order[:validation]),
        "test": sorted(order[validation : validation + test]),
        "ood": sorted(ood),
    }
    empty = [name for name, members in splits.items() if not members]
    if empty:
        raise UserError(
            f"of {len(everything)} sequences none is left for {', '.join(empty)}; raise "
            "--validation-fraction, --test-fraction or --ood-fraction, or give more sequences"
        )
    return splits
