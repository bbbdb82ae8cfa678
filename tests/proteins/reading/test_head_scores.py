"""Scores of heads against their definition, pair by pair."""

import math

import pytest
import torch

from performers.proteins.reading.head_scores import local_global_score, residue_mask


def _everywhere(batch, length):
    return torch.ones(batch, length, dtype=torch.bool)


def _random_attention(batch, heads, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, heads, length, length, generator=generator).softmax(-1)


def test_residue_mask_drops_padding_and_special_tokens():
    tokens = torch.tensor([[1, 7, 4, 9, 2], [1, 7, 2, 0, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = [[False, True, False, True, False], [False, True, False, False, False]]
    assert residue_mask(tokens, mask, [0, 1, 2, 3, 4]).tolist() == expected


def test_scores_match_their_definition_pair_by_pair():
    weights = _random_attention(2, 3, 9)
    residues = _everywhere(2, 9)
    residues[0, 0] = residues[0, 8] = residues[1, 5:] = False
    scores = local_global_score([weights], residues, band=2)
    for head, score in enumerate(scores.heads):
        total = distance = near = top = emitted = 0.0
        for b in range(2):
            inside = [i for i in range(9) if residues[b, i]]
            columns = []
            for j in inside:
                columns.append(sum(float(weights[b, head, i, j]) for i in inside))
                for i in inside:
                    weight = float(weights[b, head, i, j])
                    distance += weight * abs(i - j)
                    near += weight * (abs(i - j) <= 2)
            emitted += sum(float(weights[b, head, i].sum()) for i in inside)
            total += sum(columns)
            top += max(columns)
        assert score.mean_distance == pytest.approx(distance / total)
        assert score.band_share == pytest.approx(near / total)
        assert score.column_share == pytest.approx(top / total)
        assert score.special_share == pytest.approx(1 - total / emitted)
    assert scores.residues == 12
    assert [score.label for score in scores.heads] == ["1.1", "1.2", "1.3"]


@pytest.mark.parametrize("length", [1, 2, 33, 100])
def test_uniform_reference_has_the_closed_form(length):
    weights = _random_attention(1, 1, length)
    both_ways = local_global_score([weights], _everywhere(1, length)).uniform
    assert both_ways.mean_distance == pytest.approx((length**2 - 1) / (3 * length))
    assert both_ways.column_share == pytest.approx(math.ceil(0.05 * length) / length)
    causal = local_global_score([weights], _everywhere(1, length), is_causal=True).uniform
    assert causal.mean_distance == pytest.approx((length - 1) / 4)


def test_kinds_are_those_of_planted_local_global_and_vertical_heads():
    length = 40
    position = torch.arange(length)
    gap = (position[:, None] - position[None, :]).abs().double()
    local = (-gap).softmax(-1)
    far = (gap / 4).softmax(-1)
    vertical = (10.0 * (position == 17)).expand(length, length).softmax(-1)
    even = torch.full((length, length), 1 / length, dtype=torch.float64)
    layers = [torch.stack([even, local])[None], torch.stack([vertical, far])[None]]
    scores = local_global_score(layers, _everywhere(1, length))
    labels = {kind: [head.label for head in found] for kind, found in scores.kinds().items()}
    # What looks far away looks at the ends.
    vertical = ["2.1", "2.2"]
    assert labels == {"local": ["1.2"], "global": ["1.1", "2.2"], "vertical": vertical}
    assert scores.heads[0].mean_distance == pytest.approx(scores.uniform.mean_distance)
    assert scores.heads[0].band_share == pytest.approx(scores.uniform.band_share)


def test_head_that_only_reads_special_tokens_is_undefined_and_of_no_kind():
    weights = _random_attention(1, 2, 6)
    weights[0, 0] = torch.nn.functional.one_hot(torch.zeros(6, dtype=torch.long), 6).float()
    residues = _everywhere(1, 6)
    residues[0, 0] = False
    scores = local_global_score([weights], residues)
    assert math.isnan(scores.heads[0].mean_distance)
    assert scores.heads[0].special_share == pytest.approx(1.0)
    assert all(scores.heads[0] not in found for found in scores.kinds().values())


def test_garbage_attention_of_padding_changes_nothing():
    weights = _random_attention(1, 2, 7)
    residues = _everywhere(1, 7)
    residues[0, 5:] = False
    clean = local_global_score([weights], residues)
    dirty = weights.clone()
    dirty[:, :, 5:, :] = math.nan
    assert local_global_score([dirty], residues).heads == clean.heads


def test_bad_arguments_are_named():
    weights = _random_attention(1, 2, 7)
    with pytest.raises(ValueError, match="band"):
        local_global_score([weights], _everywhere(1, 7), band=-1)
    with pytest.raises(ValueError, match="residues"):
        local_global_score([weights], ~_everywhere(1, 7))
    with pytest.raises(ValueError, match="layer 2"):
        local_global_score([weights, weights[..., :5]], _everywhere(1, 7))
