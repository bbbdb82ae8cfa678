"""Held-out clusters have no relatives in the rest, and every sequence is in one split."""

import hashlib

import numpy as np

from performers.proteins.corpus.splitting import (
    SPLITS,
    candidate_clusters,
    draws,
    independent_clusters,
    split_bounds,
    split_codes,
    whole_groups,
)

CLUSTERS = {f"c{i}": [f"c{i}", *(f"m{i}.{j}" for j in range(i % 3))] for i in range(60)}


def test_draws_depend_on_name_seed_and_draw_alone():
    names = [f"n{i}" for i in range(50)]
    drawn = draws(names, 1, "a")
    expected = [int(hashlib.sha256(f"1:a:{name}".encode()).hexdigest()[:16], 16) for name in names]
    assert drawn.tolist() == expected
    assert (drawn != draws(names, 2, "a")).all()
    assert (drawn != draws(names, 1, "b")).all()
    assert draws([], 1, "a").size == 0


def test_candidates_reach_the_number_without_large_clusters():
    clusters = {**CLUSTERS, "giant": [f"g{i}" for i in range(100)]}
    chosen = candidate_clusters(clusters, 0, 40, 3)
    total = sum(len(clusters[name]) for name in chosen)
    assert 40 <= total <= 42
    assert "giant" not in chosen
    assert all(len(clusters[name]) < 3 for name in candidate_clusters(clusters, 0, 40, 2))


def relatives_of(pairs):
    """A search that knows all relations between clusters, and the arguments it was called with."""
    both = {*pairs, *((b, a) for a, b in pairs)}
    calls = []

    def relatives(held, others, thorough):
        calls.append((list(held), others, thorough))
        targets = CLUSTERS.keys() - set(held) if others is None else others
        assert not set(held) & set(targets)
        return [name for name in held if thorough and any((name, o) in both for o in targets)]

    return relatives, calls


def test_related_to_the_rest_or_to_such_is_not_held_out():
    # c1-c2 are related to each other only; c4 is related to c3, which is to the rest; c5 to none.
    relatives, calls = relatives_of([("c1", "c2"), ("c4", "c3"), ("c3", "c50")])
    held = independent_clusters(["c4", "c1", "c5", "c2", "c3"], relatives)
    assert held == ["c1", "c5", "c2"]
    # Quickly, thoroughly, in what that dropped, and in what that dropped: nothing is left to find.
    assert [thorough for _, _, thorough in calls] == [False, True, True, True]
    assert [others for _, others, _ in calls] == [None, None, ["c3"], ["c4"]]


def test_what_a_quick_search_finds_is_searched_for_relatives_too():
    def relatives(held, others, thorough):
        if not thorough:
            return ["c3"]
        return [name for name in held if name == "c4" and others is None and "c3" not in held]

    assert independent_clusters(["c4", "c3", "c6"], relatives) == ["c6"]


def test_no_candidate_is_left():
    relatives, _ = relatives_of([("c3", "c50")])
    assert independent_clusters(["c3"], relatives) == []
    assert independent_clusters([], relatives) == []


def test_related_clusters_are_taken_together():
    hits = [("c0", "c3"), ("m5.1", "m5.0")]
    assert whole_groups(["c0", "c9", "c3", "c5"], hits, CLUSTERS, 2) == ["c0", "c3"]
    assert whole_groups(["c0", "c9", "c3", "c5"], hits, CLUSTERS, 3) == ["c0", "c3", "c9"]


def test_a_group_too_large_for_what_is_asked_is_passed_over():
    # c2, c5 and c8 have three members each.
    hits = [("c2", "c5"), ("c5", "c8")]
    assert whole_groups(["c2", "c5", "c8", "c0", "c3"], hits, CLUSTERS, 2) == ["c0", "c3"]


def test_the_draws_are_independent():
    """Clusters that are not held out have their share of every other split."""
    names = [f"c{i}" for i in range(4000)]
    candidates = candidate_clusters({name: [name] for name in names}, 0, 400, 1)
    held, passed_over = (np.isin(names, some) for some in (candidates[:40], candidates[40:]))
    numbers = draws(names, 0, "sequences")
    codes = split_codes(numbers, held, split_bounds(numbers[~held], 1000, 1000))
    for split in ("validation", "test"):
        # 90 expected, standard deviation 8.
        assert 55 < (codes[passed_over] == SPLITS.index(split)).sum() < 125


def test_bounds_of_few_sequences():
    numbers = draws(["a", "b", "c"], 0, "sequences")
    nobody = np.zeros(3, dtype=bool)
    for sizes, expected in (((1, 2), [1, 2, 2]), ((0, 0), [0, 0, 0])):
        codes = split_codes(numbers, nobody, split_bounds(numbers, *sizes))
        assert sorted(codes.tolist()) == expected
