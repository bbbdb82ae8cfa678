"""Converted models inside a sequence-parallel context: positions, and what a shard cannot tell."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from performers.attention.sharding import sharded
from performers.convert import load_performer, to_performer
from performers.convert.families.shards import check_shards
from tests.convert.models import build, small, token_ids


class Alone(NamedTuple):
    """Takes the values of a call for its output, as if each token saw itself alone."""

    row: int = 0

    def attend(self, call, backend):
        groups = call.query.shape[1] // call.value.shape[1]
        return call.value.unsqueeze(2).expand(-1, -1, groups, -1, -1)


def converted(kind):
    return to_performer(build(kind), num_features=8)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "opt", "electra"])
def test_positions_are_asked_for(kind):
    model = converted(kind).eval()
    ids = token_ids(2, 12)
    positions = torch.arange(12).expand(2, -1)
    keep = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with torch.no_grad(), sharded(Alone()):
        with pytest.raises(ValueError, match=r"position_ids must be passed to .*distributed.shard"):
            model(ids, **keep)
        with pytest.raises(ValueError, match="position_ids must be passed"):
            model.base_model(input_ids=ids, **keep)
        first = model(ids, position_ids=positions, **keep)[0]
        second = model(ids, position_ids=positions + 12, **keep)[0]
        # A shard of the row that has both.
        both = model(torch.cat((ids, ids), 1), position_ids=torch.arange(24).expand(2, -1), **keep)[
            0
        ]
    torch.testing.assert_close(torch.cat((first, second), 1), both)
    assert model(ids, **keep)[0].shape[:2] == ids.shape


@pytest.mark.parametrize(
    ("model", "message"),
    [
        # Its positions count from the row after that of padding.
        (lambda: converted("roberta"), "does not follow position_ids that count from 0"),
        (lambda: converted("vit"), "takes no position_ids"),
        (lambda: converted("bart"), "would need two rows"),
        (
            lambda: to_performer(small("BertForSequenceClassification"), num_features=8),
            "pools over a row",
        ),
    ],
    ids=["roberta", "vit", "bart", "classifier"],
)
def test_models_that_shards_would_compute_wrong(model, message):
    model = model()
    with pytest.raises(ValueError, match=f"{message}.*call it outside the context"):
        check_shards(model)
    with sharded(Alone()), pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 32, 32) if "ViT" in type(model).__name__ else token_ids(1, 12))


def test_a_layer_that_mixes_tokens():
    model = build("llama")

    class Smoothed(nn.Module):
        def forward(self, x):
            return x + x.roll(1, 1)

    model.model.norm = nn.Sequential(model.model.norm, Smoothed())
    with pytest.raises(ValueError, match="mixes its tokens outside its attention"):
        check_shards(to_performer(model, num_features=8))


def test_a_loaded_model_asks_too(tmp_path):
    converted("llama").save_pretrained(tmp_path)
    loaded = load_performer(tmp_path)
    with sharded(Alone()), pytest.raises(ValueError, match="position_ids must be passed"):
        loaded(token_ids(1, 12))
