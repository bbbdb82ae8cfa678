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

    def tell_positions(self, position_ids):
        pass


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


def with_rope(kind):
    """A model whose frequencies depend on the length of a row, beyond 16 positions."""
    model = build("llama")
    rope = {"rope_type": kind, "rope_theta": 100.0, "original_max_position_embeddings": 16}
    half = model.config.hidden_size // model.config.num_attention_heads // 2
    factors = {"long_factor": [4.0] * half, "short_factor": [1.0] * half}
    model.config.rope_parameters = {**rope, **(factors if kind == "longrope" else {"factor": 4.0})}
    return to_performer(type(model)(model.config), num_features=8)


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
        (lambda: with_rope("dynamic"), "rotary positions .'dynamic'. from the largest position"),
        (lambda: with_rope("longrope"), "rotary positions .'longrope'. from the largest position"),
    ],
    ids=["roberta", "vit", "bart", "classifier", "dynamic", "longrope"],
)
def test_models_that_shards_would_compute_wrong(model, message):
    model = model()
    with pytest.raises(ValueError, match=f"{message}.*call it outside the context"):
        check_shards(model)
    with sharded(Alone()), pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 32, 32) if "ViT" in type(model).__name__ else token_ids(1, 12))


def test_layers_that_are_left_out_at_random():
    model = converted("opt").train()
    model.config.layerdrop = 0.1
    inputs = {"input_ids": token_ids(1, 12), "position_ids": torch.arange(12)[None]}
    with sharded(Alone()):
        with pytest.raises(ValueError, match=r"layerdrop=0\.1 lets each process leave out"):
            model(**inputs, use_cache=False)
        model.eval()(**inputs, use_cache=False)


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
