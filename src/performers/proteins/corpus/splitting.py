"""Splits of a corpus: test by sequence, out-of-distribution by whole clusters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

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
    """The first 64 bits of SHA-256 of seed, draw and each name: uniform numbers.

    ``draw`` names what is drawn. Two draws with one number would not be independent: what the first
    takes from the smallest numbers is not left for the second.
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

    They are all clusters, or those with the smallest draws; the sequences may then be fewer. A
    cluster with more members than ``largest`` is passed over: it alone would decide what out of
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

    Returns:
        Names in the order of ``candidates``.
    """
    held, outside = list(candidates), list[str]()

    def drop(others: Sequence[str] | None, thorough: bool) -> None:
        nonlocal held, outside
        outside = list(relatives(held, others, thorough)) if held else []
        gone = set(outside)
        held = [name for name in held if name not in gone]

    drop(None, False)
    drop(None, True)
    while held and outside:
        drop(outside, True)
    return held


def whole_groups(
    candidates: Sequence[str],
    hits: Iterable[tuple[str, str]],
    clusters: Clusters,
    sequences: int,
) -> list[str]:
    """Candidates that make up a number of sequences, related ones together or not at all.

    A group that would exceed the number by a fifth is passed over. Candidates come in order of
    preference, and ``hits`` are all direct relations between their members.
    """
    cluster_of = {member: name for name in candidates for member in clusters[name]}
    # Each candidate's group of related ones, which are one object.
    groups = {name: {name} for name in candidates}
    for query, target in hits:
        ours, theirs = groups[cluster_of[query]], groups[cluster_of[target]]
        if ours is not theirs:
            ours |= theirs
            groups.update(dict.fromkeys(theirs, ours))
    taken: list[str] = []
    seen: set[str] = set()
    total = 0
    for name in candidates:
        if total >= sequences:
            break
        if name in seen:
            continue
        group = groups[name]
        seen |= group
        size = sum(len(clusters[member]) for member in group)
        if total + size <= _GREATEST_SHARE * sequences:
            taken += [candidate for candidate in candidates if candidate in group]
            total += size
    return taken


def split_bounds(smallest: Draws, validation: int, test: int) -> tuple[int, int]:
    """The draws from which on a sequence is no more for validation, and no more for testing.

    Sequences with one draw (those of a cluster, where clusters are drawn) go to one split; a split
    then is the smaller for those that would exceed it. ``smallest`` are the smallest draws of the
    sequences that are not held out, more than are asked for, or else all; in any order.
    """
    ordered = np.sort(smallest)
    ends = (validation, validation + test)
    last = int(np.iinfo(np.uint64).max)
    first, second = (int(ordered[end]) if end < ordered.size else last for end in ends)
    return first, second


def split_codes(
    draws: Draws, held_out: npt.NDArray[np.bool_], bounds: tuple[int, int]
) -> npt.NDArray[np.int8]:
    """The split of each sequence, as its place in `SPLITS`, by its draw."""
    codes = np.zeros(draws.size, dtype=np.int8)
    codes[draws < np.uint64(bounds[1])] = SPLITS.index("test")
    codes[draws < np.uint64(bounds[0])] = SPLITS.index("validation")
    codes[held_out] = SPLITS.index("ood")
    return codes
