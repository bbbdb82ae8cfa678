"""Held-out clusters have no relatives in the rest, and every sequence is in one split."""

import pytest

from performers.app.errors import UserError
from performers.proteins.corpus.splitting import (
    assign_splits,
    candidate_clusters,
    independent_clusters,
    shuffled,
    whole_groups,
)

CLUSTERS = {f"c{i}": [f"c{i}", *(f"m{i}.{j}" for j in range(i % 3))] for i in range(60)}


def test_order_depends_on_seed_and_draw_alone():
    names = [f"n{i}" for i in range(50)]
    order = shuffled(names, 1, "a")
    assert order == shuffled(reversed(names), 1, "a")
    assert order != shuffled(names, 2, "a")
    assert order != shuffled(names, 1, "b")


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
        assert not set(held) & set(others)
        calls.append((list(held), list(others), thorough))
        return [name for name in held if thorough and any((name, o) in both for o in others)]

    return relatives, calls


def test_related_to_the_rest_or_to_such_is_not_held_out():
    # c1-c2 are related to each other only; c4 is related to c3, which is to the rest; c5 to none.
    relatives, calls = relatives_of([("c1", "c2"), ("c4", "c3"), ("c3", "c50")])
    held = independent_clusters(["c4", "c1", "c5", "c2", "c3"], CLUSTERS, relatives)
    assert held == ["c1", "c5", "c2"]
    # Quickly, thoroughly, in what that dropped, and in what that dropped: nothing is left to find.
    assert [thorough for _, _, thorough in calls] == [False, True, True, True]
    assert [others for _, others, _ in calls[2:]] == [["c3"], ["c4"]]
    for _, others, _ in calls[:2]:
        assert sorted(others) == sorted(CLUSTERS.keys() - {"c1", "c2", "c3", "c4", "c5"})


def test_what_a_quick_search_finds_is_searched_for_relatives_too():
    def relatives(held, others, thorough):
        if not thorough:
            return ["c3"]
        return [name for name in held if name == "c4" and "c3" in others]

    assert independent_clusters(["c4", "c3", "c6"], CLUSTERS, relatives) == ["c6"]


def test_no_candidate_is_left():
    relatives, _ = relatives_of([("c3", "c50")])
    assert independent_clusters(["c3"], CLUSTERS, relatives) == []
    assert independent_clusters([], CLUSTERS, relatives) == []


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
    clusters = {f"c{i}": [f"c{i}"] for i in range(4000)}
    candidates = candidate_clusters(clusters, 0, 400, 1)
    splits = assign_splits(
        clusters, candidates[:40], validation_fraction=0.25, test_fraction=0.25, seed=0
    )
    passed_over = set(candidates[40:])
    for name in ("validation", "test"):
        # 90 expected, standard deviation 8.
        assert 55 < len(passed_over & set(splits[name])) < 125


def test_every_sequence_is_in_one_split():
    splits = assign_splits(
        CLUSTERS, ["c7", "c8"], validation_fraction=0.05, test_fraction=0.1, seed=3
    )
    members = [name for group in CLUSTERS.values() for name in group]
    assert sorted(name for names in splits.values() for name in names) == sorted(members)
    assert splits["ood"] == sorted(CLUSTERS["c7"] + CLUSTERS["c8"])
    assert len(splits["validation"]) == round(0.05 * len(members))
    assert len(splits["test"]) == round(0.1 * len(members))


def test_empty_split_is_named():
    with pytest.raises(UserError, match="none is left for ood"):
        assign_splits(CLUSTERS, [], validation_fraction=0.1, test_fraction=0.1, seed=0)
