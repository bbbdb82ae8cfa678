"""Which sequence goes where: test by sequence, out-of-distribution by whole clusters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from performers.proteins.errors import UserError

Clusters = Mapping[str, Sequence[str]]
"""The members of each cluster, by its name (the representative's)."""


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Names in an order that the seed alone fixes, the same with every library version."""
    return sorted(names, key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).hexdigest())


def candidate_clusters(clusters: Clusters, seed: int, sequences: int) -> list[str]:
    """The first clusters in shuffled order that together have so many sequences.

    A cluster with more than a tenth of that number is passed over: it alone would decide what
    out of distribution means.
    """
    chosen: list[str] = []
    total = 0
    for name in shuffled(clusters, seed):
        if total >= sequences:
            break
        if len(clusters[name]) <= max(1, sequences // 10):
            chosen.append(name)
            total += len(clusters[name])
    return chosen


def unrelated_clusters(
    candidates: Sequence[str],
    hits: Iterable[tuple[str, str]],
    clusters: Clusters,
    sequences: int,
) -> list[str]:
    """Candidates that may be held out together: no member has a relative among what stays.

    Args:
        candidates: Names of clusters, in order of preference.
        hits: (member of a candidate, any related sequence), direct relations.
        clusters: All clusters.
        sequences: Stop once so many sequences are held out.

    Returns:
        Names in the order of ``candidates``. Clusters related to each other are taken together or
        not at all.
    """
    cluster_of = {member: name for name, members in clusters.items() for member in members}
    wanted = set(candidates)
    related: dict[str, set[str]] = {name: set() for name in candidates}
    for query, target in hits:
        ours, theirs = cluster_of[query], cluster_of[target]
        if ours != theirs:
            related[ours].add(theirs)
            if theirs in wanted:
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
        seen |= group & wanted
        if group <= wanted:
            members = [candidate for candidate in candidates if candidate in group]
            taken += members
            total += sum(len(clusters[member]) for member in members)
    return taken


def _connected(start: str, related: Mapping[str, set[str]]) -> set[str]:
    group, edge = {start}, [start]
    while edge:
        # What is no candidate has no entry: the group is out, and where it leads is no matter.
        new = related.get(edge.pop(), set()) - group
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
    order = shuffled((name for name in everything if name not in ood), seed)
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
