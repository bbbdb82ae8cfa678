"""Converted encoders whose queries also meet keys that are listed for their content."""

import copy

import pytest
import torch
from torch import nn

from performers import LearnedFeatures
from performers.convert import distill, to_performer
from performers.models import PerformerConfig, PerformerModel
from performers.nn import FavorAttention
from tests.convert.architectures import (
    ENCODERS,
    SPEECH,
    VISION,
    build,
    converted,
    inputs,
    output,
    padding_mask,
    token_ids,
)
from tests.convert.test_refusals import untouched

BOTH_SIDES = [*ENCODERS, *VISION, *(x for x in SPEECH if x != "whisper")]
FITTED = {"num_features": 16, "estimator": "data_aware", "window": 1}


def blocks(model):
    return [x for x in model.modules() if isinstance(x, FavorAttention)]


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_lists_of_every_key_give_the_original(name):
    model, given = build(name), inputs(name)
    expected = output(model, given)
    got = output(converted(model, num_features=16, listed_keys=1000), given)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_listed(side):
    model, given = build("bert"), inputs("bert")
    mask = padding_mask(2, 20, side)
    linear = converted(model, num_features=16, window=1, listed_keys=6)
    outputs = [
        output(linear, {**given, "input_ids": torch.where(mask.bool(), given["input_ids"], x)},
               attention_mask=mask)[mask.bool()]
        for x in (7, 30)
    ]  # fmt: skip
    torch.testing.assert_close(*outputs, atol=0, rtol=0)


@pytest.mark.exhaustive
def test_longer_lists_come_closer_to_the_original():
    model, given = build("bert"), inputs("bert", rows=4, length=60)
    expected = output(model, given)
    errors = []
    for count in (0, 12, 40):
        linear = converted(model, **FITTED, listed_keys=count, calibration=[given])
        errors.append(float((output(linear, given) - expected).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_lists_are_fitted_to_the_queries_of_the_calibration():
    model, given = build("bert"), inputs("bert", rows=4, length=60)
    drawn = converted(model, num_features=16, listed_keys=6)
    fitted = converted(model, **FITTED, listed_keys=6, calibration=[given])
    padded = {**inputs("bert", rows=4, length=60)}
    padded["attention_mask"] = torch.ones(4, 60, dtype=torch.long)
    padded["attention_mask"][:, 50:] = 0
    for x, y in zip(blocks(drawn), blocks(fitted), strict=True):
        assert x.buckets.centers.shape == y.buckets.centers.shape
        assert not torch.allclose(x.buckets.centers, y.buckets.centers)
    # Queries at padding are nobody's.
    other = {**padded, "input_ids": padded["input_ids"].clone()}
    other["input_ids"][:, 50:] = 3
    first, second = (
        converted(model, **FITTED, listed_keys=6, calibration=[x]) for x in (padded, other)
    )
    for x, y in zip(blocks(first), blocks(second), strict=True):
        torch.testing.assert_close(x.buckets.centers, y.buckets.centers)


def test_lists_are_fitted_beside_features_that_are_not():
    given = inputs("bert", rows=4, length=60)
    drawn = converted(build("bert"), num_features=16, listed_keys=6)
    fitted = converted(build("bert"), num_features=16, listed_keys=6, calibration=[given])
    for x, y in zip(blocks(drawn), blocks(fitted), strict=True):
        assert torch.equal(x.feature_map.weight, y.feature_map.weight)
        assert not torch.allclose(x.buckets.centers, y.buckets.centers)


def test_attention_maps_have_the_listed_pairs():
    model, given = build("bert"), inputs("bert")
    linear = converted(model, num_features=16, listed_keys=1000)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected, got = (x(**given, output_attentions=True).attentions for x in (model, linear))
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-4)


@pytest.mark.exhaustive
def test_distillation_keeps_the_lists():
    teacher = build("bert")
    given = inputs("bert", rows=4, length=40)
    student = converted(copy.deepcopy(teacher), **FITTED, listed_keys=6, calibration=[given])
    data = [{"input_ids": x} for x in token_ids(6, 40)]
    result = distill(student, teacher, data, transfer_steps=3, steps=3, batch_size=2)
    assert result.finished
    with_lists = output(student, given)
    for block in blocks(student):
        assert isinstance(block.feature_map, LearnedFeatures)
        block.buckets = None
    expected, without = output(teacher, given), output(student, given)
    assert (with_lists - expected).norm() < 0.8 * (without - expected).norm()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("gpt2", {"listed_keys": 4}, "a decoder's running sums hold no lists"),
        ("bart", {"listed_keys": 4}, "a decoder's running sums hold no lists"),
        ("bert", {"listed_keys": -1}, "listed_keys must be an integer of at least 0, got -1"),
        ("bert", {"listed_keys": 2.0}, "listed_keys must be an integer"),
        (
            "bert",
            {"listed_keys": 4, "estimator": "trigonometric"},
            "listed_keys needs positive features",
        ),
    ],
)
def test_what_cannot_have_lists_is_refused(name, options, sentence):
    model = build(name)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=sentence):
        to_performer(model, **options)
    untouched(model, before)


def test_the_encoder_of_an_encoder_decoder_can_have_lists():
    model = build("bart")
    encoder_layers = len(model.model.encoder.layers)
    linear = converted(model, num_features=16, listed_keys=4, layers=range(encoder_layers))
    assert len(blocks(linear)) == encoder_layers


def test_other_models_are_refused():
    config = PerformerConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        attention="exact",
    )  # fmt: skip
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 1)
    for model in (PerformerModel(config), encoder):
        with pytest.raises(ValueError, match="listed_keys=4 is for encoders among transformers"):
            to_performer(model, listed_keys=4)


def test_packed_sequences_are_refused():
    linear = converted(build("bert"), num_features=16, listed_keys=4)
    block = blocks(linear)[0]
    query = torch.randn(2, 4, 20, 8)
    boundaries = torch.tensor([0, 10, 20, 30, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match="takes no packed sequences"):
        block(query, query, query, cu_seqlens=boundaries)
