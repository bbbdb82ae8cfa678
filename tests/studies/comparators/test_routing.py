"""Routing attention against lists of clusters, and its centroids."""

import pytest
import torch

from performers.models.context import AttentionContext
from tests.models.cases import tokens
from tests.studies.comparators.oracle import (
    compare,
    contexts,
    dense,
    in_groups,
    inputs,
    make_mechanism,
    make_model,
)


def mechanism(clusters, window):
    return make_mechanism("routing", clusters=clusters, window=window, decay=0.9)


def normalised(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def nearest(module, query):
    return (normalised(query) @ module.centroids.mT).argmax(-1)


@pytest.mark.parametrize(
    ("length", "options"),
    [(1, (3, 4)), (5, (2, 1)), (33, (4, 3)), (40, (1, 4)), (40, (5, 50)), (60, (50, 3))],
    ids=str,
)
def test_the_clusters_of_the_definition(length, options):
    module = mechanism(*options)
    query, _, value = inputs(length)
    for context in contexts(length):
        scores = normalised(query) @ normalised(query).mT / 8**0.5
        allowed = in_groups(context, nearest(module, query).unsqueeze(2), module.reach)
        expected = dense(scores, value, allowed)
        compare(module, (query, query, value), context, expected)


def test_centroids_move_in_training_towards_their_tokens():
    module = mechanism(4, 8).train()
    query, _, value = inputs(50)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 20:] = False
    before = module.centroids.clone()
    cluster = nearest(module, query)
    context = AttentionContext(is_causal=True, key_mask=mask)
    module.eval()(query, query, value, context, 0)
    assert torch.equal(module.centroids, before)
    module.train()(query, query, value, context, 0)
    for head in range(3):
        for number in range(4):
            chosen = (cluster[:, head] == number) & mask
            members = normalised(query)[:, head][chosen]
            mean = (members / members.norm(dim=-1, keepdim=True)).sum(0)
            expected = before[head, number]
            if len(members):
                expected = 0.9 * expected + 0.1 * mean / mean.norm()
            expected = expected / expected.norm()
            torch.testing.assert_close(module.centroids[head, number], expected)


def test_a_layer_that_is_computed_again_has_the_clusters_it_had():
    """And moves its centroids once."""
    model = make_model("routing", reversible=True, num_hidden_layers=4).train()
    ids = tokens(2, 30)
    loss = model(ids, labels=ids).loss
    centroids = [p.clone() for name, p in model.named_parameters() if "centroids" in name]
    assert len(centroids) == 4
    loss.backward()
    after = [p for name, p in model.named_parameters() if "centroids" in name]
    assert all(torch.equal(x, y) for x, y in zip(centroids, after, strict=True))
