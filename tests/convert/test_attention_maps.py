"""``output_attentions`` of converted models."""

import pytest
import torch

from tests.convert.architectures import (
    ARCHITECTURES,
    build,
    converted,
    inputs,
)

COVERING = 64
ALL = list(ARCHITECTURES)


@pytest.mark.parametrize("name", ALL)
def test_attention_maps_are_those_of_the_original_under_a_covering_window(name):
    model, given = build(name), inputs(name)
    maps = converted(model, window=COVERING)(**given, output_attentions=True, **_no_cache(model))
    model.set_attn_implementation("eager")
    expected = model(**given, output_attentions=True, **_no_cache(model))
    kinds = [key for key in expected if key.endswith("attentions")]
    assert sum(len(expected[key]) for key in kinds) >= 2
    for key in kinds:
        assert len(maps[key]) == len(expected[key])
        for got, want in zip(maps[key], expected[key], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def _no_cache(model):
    return {"use_cache": False} if getattr(model.config, "use_cache", False) else {}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gemma3", "whisper"])
def test_rows_of_attention_maps_sum_to_one(name):
    model = converted(build(name), num_features=16, window=2)
    result = model(**inputs(name), output_attentions=True, **_no_cache(model))
    for key in (key for key in result if key.endswith("attentions")):
        for weights in result[key]:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_attention_maps_with_a_cache_are_refused():
    model = converted(build("llama"), num_features=16)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**inputs("llama"), output_attentions=True, use_cache=True)
