"""Scores of heads against their definition, pair by pair."""

import math

import pytest
import torch

from performers.proteins.reading.head_scores import local_global_score


def _everywhere(length):
    return torch.ones(length, dtype=torch.bool)


def _random_attention(heads, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(heads, length, length, generator=generator).softmax(-1)


def test_scores_match_their_definition_pair_by_pair():
    weights = _random_attention(3, 29)
    residues = _everywhere(29)
    residues[[0, 11, 28]] = False
    inside = residues.nonzero().flatten().tolist()
    scores = local_global_score([weights], residues, band=2)
    for attention, score in zip(weights.tolist(), scores.heads, strict=True):
        pairs = {(i, j): attention[i][j] for i in inside for j in inside}
        total = sum(pairs.values())
        emitted = sum(sum(attention[i]) for i in inside)
        columns = sorted(sum(attention[i][j] for i in inside) for j in inside)
        distance = sum(weight * abs(i - j) for (i, j), weight in pairs.items())
        near = sum(weight for (i, j), weight in pairs.items() if abs(i - j) <= 2)
        assert score.mean_distance == pytest.approx(distance / total)
        assert score.band_share == pytest.approx(near / total)
        # Of 26 residues, 5% are two.
        assert score.column_share == pytest.approx(sum(columns[-2:]) / total)
        assert score.special_share == pytest.approx(1 - total / emitted)
    assert [score.label for score in scores.heads] == ["1.1", "1.2", "1.3"]


@pytest.mark.parametrize("length", [1, 2, 33, 100])
def test_uniform_reference_has_the_closed_form(length):
    weights = _random_attention(1, length)
    both_ways = local_global_score([weights], _everywhere(length)).uniform
    assert both_ways.mean_distance == pytest.approx((length**2 - 1) / (3 * length))
    assert both_ways.column_share == pytest.approx(math.ceil(0.05 * length) / length)
    causal = local_global_score([weights], _everywhere(length), is_causal=True).uniform
    assert causal.mean_distance == pytest.approx((length - 1) / 4)


def test_kinds_are_those_of_planted_local_global_and_vertical_heads():
    length = 40
    position = torch.arange(length)
    gap = (position[:, None] - position[None, :]).abs().double()
    local = (-gap).softmax(-1)
    far = (gap / 4).softmax(-1)
    vertical = (10.0 * (position == 17)).expand(length, length).softmax(-1)
    even = torch.full((length, length), 1 / length, dtype=torch.float64)
    layers = [torch.stack([even, local]), torch.stack([vertical, far])]
    scores = local_global_score(layers, _everywhere(length))
    labels = {kind: [head.label for head in found] for kind, found in scores.kinds().items()}
    # What looks far away looks at the ends.
    vertical = ["2.1", "2.2"]
    assert labels == {"local": ["1.2"], "global": ["1.1", "2.2"], "vertical": vertical}
    assert scores.heads[0].mean_distance == pytest.approx(scores.uniform.mean_distance)
    assert scores.heads[0].band_share == pytest.approx(scores.uniform.band_share)


def test_head_that_only_reads_special_tokens_is_undefined_and_of_no_kind():
    weights = _random_attention(2, 6)
    weights[0] = torch.nn.functional.one_hot(torch.zeros(6, dtype=torch.long), 6).float()
    residues = _everywhere(6)
    residues[0] = False
    scores = local_global_score([weights], residues)
    assert math.isnan(scores.heads[0].mean_distance)
    assert scores.heads[0].special_share == pytest.approx(1.0)
    assert all(scores.heads[0] not in found for found in scores.kinds().values())
