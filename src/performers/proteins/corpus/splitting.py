"""Splits of a corpus: test by sequence, out-of-distribution by whole clusters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "validation", "test", "ood")

Clusters = Mapping[str, Sequence[str]]
"""The members of each cluster, by its name (the representative's)."""

Relatives = Callable[[Sequence[str], Sequence[str] | None, bool], Collection[str]]
"""The clusters of the first ones that have a member with a relative in the second ones (None: in
all others); the last argument says whether to look thoroughly, or quickly for the close ones."""

Draws = npt.NDArray[np.uint64]

# A group of related clusters may exceed what is asked for by this much.
_GREATEST_SHARE = 1.2


def draws(names: Iterable[str], seed: int, draw: str) -> Draws:
    """A number for each name, that seed and draw alone fix, the same with every library version.

    Args:
        names: In any order.
        seed: Seed of all draws.
        draw: What is drawn. Two draws with one number would not be independent: what the first
            takes from the smallest numbers is not left for the second.

    Returns:
        The first 64 bits of SHA-256, uniform.
    """
    start = hashlib.sha256(f"{seed}:{draw}:".encode())
    digests = []
    for name in names:
        digest = start.copy()
        digest.update(name.encode())
        digests.append(digest.digest()[:8])
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def candidate_clusters(clusters: Clusters, seed: int, sequences: int, largest: int) -> list[str]:
    """The clusters with the smallest draws that together have so many sequences.

    Args:
        clusters: All of them, or those with the smallest draws; the sequences may then be fewer.
        seed: Seed of the order.
        sequences: How many.
        largest: A cluster with more members is passed over: it alone would decide what out of
            distribution means.
    """
    chosen: list[str] = []
    total = 0
    names = list(clusters)
    for place in np.argsort(draws(names, seed, "clusters"), kind="stable").tolist():
        name = names[place]
        if total >= sequences:
            break
        if len(clusters[name]) <= largest:
            chosen.append(name)
            total += len(clusters[name])
    return chosen


def independent_clusters(candidates: Sequence[str], relatives: Relatives) -> list[str]:
    """Candidates without a relative among all that is not returned.

    A candidate with a relative outside is dropped, and is then outside itself, until a round drops
    none. A search never meets the candidates' own clusters, whose members would be the best hits
    of each other and leave no place for others.

    Args:
        candidates: Names of clusters.
        relatives: Finds those with relatives.

    Returns:
        Names in the order of ``candidates``.
    """
    held, outside = list(candidates), []
    for thorough in (False, True):
        outside = list(relatives(held, None, thorough)) if held else []
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


class SplitBounds(NamedTuple):
    """The draws from which on a sequence is in the next split.

    Attributes:
        validation: Smaller draws are for validation.
        test: Smaller ones of the others are for testing, and what is left is for training.
    """

    validation: int
    test: int

    def codes(self, draws: Draws, held_out: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
        """The split of each sequence, as its place in `SPLITS`.

        Args:
            draws: Of each sequence.
            held_out: Whether its cluster is held out.
        """
        codes = np.zeros(draws.size, dtype=np.int8)
        codes[draws < np.uint64(self.test)] = SPLITS.index("test")
        codes[draws < np.uint64(self.validation)] = SPLITS.index("validation")
        codes[held_out] = SPLITS.index("ood")
        return codes


def split_bounds(smallest: Draws, validation: int, test: int) -> SplitBounds:
    """Bounds that give two splits their numbers of sequences.

    Sequences with one draw (those of a cluster, where clusters are drawn) go to one split; a split
    then is the smaller for those that would exceed it.

    Args:
        smallest: The smallest draws of the sequences that are not held out, more than are asked
            for, or else all; in any order.
        validation: Sequences for validation.
        test: Sequences for testing.
    """
    ordered = np.sort(smallest)
    last = np.iinfo(np.uint64).max
    ends = (validation, validation + test)
    return SplitBounds(*(int(ordered[end]) if end < ordered.size else int(last) for end in ends))
