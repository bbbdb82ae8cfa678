"""Converted encoders whose queries also meet keys that are listed for their content."""

import copy

import pytest
import torch

from performers import LearnedFeatures
from performers.convert import distill
from tests.convert.models import (
    build,
    converted,
    favors,
    inputs,
    output,
    padding_mask,
    token_ids,
)

FITTED = {"num_features": 16, "estimator": "data_aware", "window": 1}
LONG = inputs("bert", rows=4, length=60)


def centers(model):
    return [x.buckets.centers for x in favors(model)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_listed(side):
    given, mask = inputs("bert"), padding_mask(2, 20, side)
    linear = converted(build("bert"), num_features=16, window=1, listed_keys=6)
    rows = (torch.where(mask.bool(), given["input_ids"], x) for x in (7, 30))
    first, second = (output(linear, {"input_ids": x}, attention_mask=mask) for x in rows)
    assert torch.equal(first[mask.bool()], second[mask.bool()])


@pytest.mark.parametrize("options", [FITTED, {"num_features": 16}])
def test_lists_are_fitted_to_the_queries_of_the_calibration(options):
    """Whether features are fitted or not; queries at padding are nobody's."""
    model, given = build("bert"), {**LONG, "attention_mask": torch.ones(4, 60, dtype=torch.long)}
    given["attention_mask"][:, 50:] = 0
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 50:] = 3
    drawn = converted(model, num_features=16, listed_keys=6)
    fitted, again = (
        converted(model, **options, listed_keys=6, calibration=[x]) for x in (given, other)
    )
    for x, y, z in zip(*map(centers, (drawn, fitted, again)), strict=True):
        assert x.shape == y.shape
        assert not torch.allclose(x, y)
        torch.testing.assert_close(y, z)
    if "estimator" not in options:
        pairs = zip(favors(drawn), favors(fitted), strict=True)
        assert all(torch.equal(x.feature_map.weight, y.feature_map.weight) for x, y in pairs)


@pytest.mark.exhaustive
def test_distillation_keeps_the_lists():
    teacher, given = build("bert"), inputs("bert", rows=4, length=40)
    student = converted(copy.deepcopy(teacher), **FITTED, listed_keys=6, calibration=[given])
    data = [{"input_ids": x} for x in token_ids(6, 40)]
    assert distill(student, teacher, data, transfer_steps=3, steps=3, batch_size=2).finished
    with_lists = output(student, given)
    for favor in favors(student):
        assert isinstance(favor.feature_map, LearnedFeatures)
        favor.buckets = None
    expected, without = output(teacher, given), output(student, given)
    assert (with_lists - expected).norm() < 0.8 * (without - expected).norm()


def test_the_encoder_of_an_encoder_decoder_can_have_lists():
    linear = converted(build("bart"), num_features=16, listed_keys=4, layers=range(2))
    assert [x.buckets is not None for x in favors(linear)] == [True, True]


def test_packed_sequences_are_refused():
    favor = favors(converted(build("bert"), num_features=16, listed_keys=4))[0]
    query = torch.randn(2, 4, 20, 8)
    boundaries = torch.tensor([0, 10, 20, 30, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match="takes no packed sequences"):
        favor(query, query, query, cu_seqlens=boundaries)
