"""Held-out clusters have no relatives in the rest, and every sequence is in one split."""

import pytest

from performers.proteins.corpus.splitting import (
    assign_splits,
    candidate_clusters,
    shuffled,
    unrelated_clusters,
)
from performers.proteins.errors import UserError

CLUSTERS = {f"c{i}": [f"c{i}", *(f"m{i}.{j}" for j in range(i % 3))] for i in range(60)}


def test_order_depends_on_the_seed_alone():
    names = [f"n{i}" for i in range(50)]
    assert shuffled(names, 1) == shuffled(reversed(names), 1) != shuffled(names, 2)


def test_candidates_reach_the_number_without_large_clusters():
    clusters = {**CLUSTERS, "giant": [f"g{i}" for i in range(100)]}
    chosen = candidate_clusters(clusters, 0, 40)
    total = sum(len(clusters[name]) for name in chosen)
    assert 40 <= total <= 43
    assert "giant" not in chosen


def test_related_to_the_rest_or_to_such_is_not_held_out():
    # c1-c2 are related to each other only; c4 is related to c3, which is to the rest; c5 to none.
    hits = [("c1", "c2"), ("m4.0", "c3"), ("c3", "m50.0"), ("m5.0", "m5.1")]
    taken = unrelated_clusters(["c4", "c1", "c5", "c2", "c3"], hits, CLUSTERS, 1000)
    assert sorted(taken) == ["c1", "c2", "c5"]


def test_relation_seen_from_one_side_only_counts():
    hits = [("c3", "c50"), ("c3", "c4")]
    assert unrelated_clusters(["c4", "c3", "c6"], hits, CLUSTERS, 1000) == ["c6"]


def test_related_clusters_are_taken_together_at_the_limit():
    taken = unrelated_clusters(["c0", "c9", "c3"], [("c0", "c9")], CLUSTERS, 1)
    assert taken == ["c0", "c9"]


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
