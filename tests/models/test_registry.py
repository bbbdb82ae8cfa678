"""Attention mechanisms that a program adds by itself."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from performers.models import PerformerConfig, PerformerForCausalLM, register_attention
from performers.models.registry import ATTENTIONS


class Before(nn.Module):
    """The mean of the values so far."""

    def forward(self, query, key, value, context, layer):
        counts = torch.arange(1, value.shape[2] + 1).unsqueeze(-1)
        return value.cumsum(2) / counts, None


@dataclass
class ScaleOptions:
    scale: float = 2.0
    rounds: int = 4

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")


class Scaled(nn.Module):
    """The values times a trained number for each head."""

    def __init__(self, heads, scale):
        super().__init__()
        self.scale = scale
        self.factors = nn.Parameter(torch.empty(heads, 1, 1))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.factors, self.scale)

    def forward(self, query, key, value, context, layer):
        return value * self.factors, None


@dataclass
class HashOptions:
    buckets: int | None = None
    chunk_size: int = 64
    rounds: int = 4


@dataclass
class WindowOptions:
    window: int = 128


def build_scaled(config, generator):
    return Scaled(config.num_attention_heads, config.attention_options["scale"])


@pytest.fixture
def registered():
    before = dict(ATTENTIONS)
    yield register_attention
    ATTENTIONS.clear()
    ATTENTIONS.update(before)


def small(**options):
    return PerformerConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **options)


def test_a_registered_attention_is_built_and_generates(registered):
    registered("mean", lambda config, generator: Before())
    model = PerformerForCausalLM(small(attention="mean")).eval()
    assert isinstance(model.performer.layers[0].attention.mechanism, Before)
    ids = torch.tensor([[1, 5, 6]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 6
    with pytest.raises(ValueError, match="has no cache"):
        model(ids, use_cache=True)


def test_names_are_taken_once_and_reasons_are_told(registered):
    registered("mean", lambda config, generator: Before(), not_causal="it looks ahead")
    with pytest.raises(ValueError, match="'mean' is registered already"):
        registered("mean", lambda config, generator: Before())
    with pytest.raises(ValueError, match="has no causal form, because it looks ahead"):
        small(attention="mean", is_decoder=True)


def test_a_mechanism_has_options_and_draws_its_parameters(registered, tmp_path):
    registered("scaled", build_scaled, options=ScaleOptions, fixed_length=True)
    config = small(attention="scaled", attention_options={"scale": 3.0})
    assert config.attention_options == {"scale": 3.0, "rounds": 4}
    assert config.longest_input == config.max_position_embeddings
    model = PerformerForCausalLM(config)
    factors = model.performer.layers[0].attention.mechanism.factors
    assert (factors == 3.0).all()
    nn.init.constant_(factors, 5.0)
    model.save_pretrained(tmp_path / "whole")
    loaded = PerformerForCausalLM.from_pretrained(tmp_path / "whole")
    assert loaded.config.attention_options == config.attention_options
    assert (loaded.performer.layers[0].attention.mechanism.factors == 5.0).all()
    PerformerForCausalLM(small(attention="exact")).save_pretrained(tmp_path / "without")
    started = PerformerForCausalLM.from_pretrained(tmp_path / "without", config=config)
    assert (started.performer.layers[0].attention.mechanism.factors == 3.0).all()
    config.attention = "exact"
    with pytest.raises(ValueError, match="attention='exact' are memory, got scale, rounds: leave"):
        PerformerForCausalLM(config)


@pytest.mark.parametrize(
    ("attention", "options", "words"),
    [
        ("scaled", {"scale": 0.0}, "attention='scaled': scale must be above 0, got 0.0"),
        ("scaled", {"scales": 1.0}, "attention='scaled' are scale, rounds, got scales: leave out"),
        ("favor-softmax", {"scale": 1.0}, "attention='favor-softmax' are none, got scale: leave"),
    ],
)
def test_options_that_are_refused(registered, attention, options, words):
    registered("scaled", build_scaled, options=ScaleOptions)
    with pytest.raises(ValueError, match=f"attention_options of {words}"):
        small(attention=attention, attention_options=options)


@pytest.mark.parametrize(
    ("attention", "former", "options"),
    [
        ("lsh", {"lsh_rounds": 3}, {"buckets": None, "chunk_size": 64, "rounds": 3}),
        (
            "lsh",
            {"lsh_rounds": 3, "lsh_buckets": 8, "attention_options": {"rounds": 5}},
            {"buckets": 8, "chunk_size": 64, "rounds": 5},
        ),
        ("local", {"window": 7}, {"window": 7}),
        ("local", {"window": None}, {"window": 128}),
        ("favor-softmax", {"lsh_rounds": 3, "linformer_rank": None, "window": 7}, {}),
    ],
)
def test_fields_of_earlier_versions_are_options(registered, tmp_path, attention, former, options):
    for name, kind in (("lsh", HashOptions), ("local", WindowOptions)):
        ATTENTIONS.pop(name, None)
        registered(name, build_scaled, options=kind)
    small().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention": attention, **former}))
    config = PerformerConfig.from_pretrained(tmp_path)
    assert config.attention_options == options
    assert config.window == (former.get("window") if attention == "favor-softmax" else None)
