"""Saving and loading: safetensors only, features included, through every door."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from performers.features import FeatureMap
from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerModel,
)
from tests.models.cases import HEADS, MAIN, assert_same, auto_class, build, output_names, tokens

LANGUAGE_MODELS = (PerformerForMaskedLM, PerformerForCausalLM)


def outputs(model):
    output = model(tokens(2, 9), return_dict=True)
    return {name: output[name] for name in output_names(type(model))}


def features(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, FeatureMap) and module.weight is not None
    }


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_model_loads_exactly(tmp_path, head):
    model = build(head)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert names <= {"model.safetensors", "config.json", "generation_config.json"}
    for door in (head, auto_class(head)):
        loaded = door.from_pretrained(tmp_path)
        assert type(loaded) is head
        assert_same(loaded.state_dict(), model.state_dict())
        assert_same(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    "options",
    [
        *({"attention": name, "features_per_head": True} for name in MAIN),
        {"estimator": "hyperbolic", "num_features": 24},
        {"estimator": "trigonometric"},
        {"projection": "gaussian", "regularized": True},
        {"attention": "favor-elu+1", "projection": None},
        {"attention": "favor-exp", "kernel_epsilon": 0.5},
        {"features_per_head": True, "position_embedding": "learned"},
        {"position_embedding": "axial", "axial_shape": [4, 8, 4]},
        {"tie_word_embeddings": False, "rope_theta": 500.0},
        {"window": 8, "sinks": 2},
        {"exact_layers": [0]},
        {"reversible": True, "chunk_size_feed_forward": 3},
    ],
    ids=str,
)
def test_options_and_features_survive_saving(tmp_path, options):
    """Whatever the seed of the process that loads them."""
    model = build(PerformerForMaskedLM, **options)
    for weight in features(model).values():
        weight.add_(1.0)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in options} == options
    assert_same(features(loaded), features(model))
    assert_same(outputs(loaded), outputs(model))
    weights = load_file(tmp_path / "model.safetensors")
    assert len([name for name in weights if "feature_map" in name]) == len(features(model))


def test_no_pickle_is_written_or_read(tmp_path):
    model = build(PerformerForMaskedLM)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for loader in (PerformerForMaskedLM, AutoModelForMaskedLM):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            loader.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="use_safetensors"):
            loader.from_pretrained(tmp_path, use_safetensors=False)
    # Beside a good file it is ignored; shards are safetensors too.
    good = build(PerformerForMaskedLM, seed=1)
    good.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {path.name for path in tmp_path.iterdir()} - {"pytorch_model.bin"}
    assert "model.safetensors.index.json" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert_same(PerformerForMaskedLM.from_pretrained(tmp_path).state_dict(), good.state_dict())


@pytest.mark.parametrize("head", LANGUAGE_MODELS)
def test_tied_embeddings_stay_tied(tmp_path, head):
    model = build(head)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len({"lm_head.weight", "performer.embeddings.weight"} & set(file.keys())) == 1
    loaded = head.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    apart = build(head, tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.get_input_embeddings().weight
    apart.save_pretrained(tmp_path / "apart")
    loaded = head.from_pretrained(tmp_path / "apart")
    assert_same(loaded.state_dict(), apart.state_dict())
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_loading_in_half_precision(tmp_path):
    model = build(PerformerForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    # A rounded projection is no longer orthogonal.
    expected = {
        name: tensor.to(torch.float32 if "feature_map" in name else torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    assert_same(loaded.state_dict(), expected)
    full = outputs(model)["logits"]
    assert (outputs(loaded)["logits"].float() - full).norm() < 0.05 * full.norm()
    loaded.save_pretrained(tmp_path / "half")
    again = PerformerForMaskedLM.from_pretrained(tmp_path / "half")
    assert_same(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [40, 20])
def test_resized_embeddings(tmp_path, size, tied):
    model = build(PerformerForMaskedLM, tie_word_embeddings=tied)
    kept = min(size, 31)
    ids = tokens(2, 9).clamp_max(kept - 1)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert model.lm_head.bias.shape == (size,)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(ids, labels=ids)
    assert after.logits.shape == (2, 9, size)
    torch.testing.assert_close(after.logits[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, after.logits)


@pytest.mark.parametrize("head", [head for head in HEADS if head is not PerformerModel])
def test_a_base_model_gets_a_head_and_is_taken_out_of_one(tmp_path, head):
    base = build(PerformerModel)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    model, report = head.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert_same(model.performer.state_dict(), base.state_dict())
    names = {"lm_head", "classifier", "qa_outputs"}
    assert {name.split(".")[0] for name in report["missing_keys"]} <= names
    assert not report["unexpected_keys"]
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 3, name
    if head is PerformerForSequenceClassification:
        assert model.classifier.weight.std() > 0.1
        assert (model.classifier.bias == 0).all()
    if head in LANGUAGE_MODELS:
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert (model.lm_head.bias == 0).all()
    model.save_pretrained(tmp_path / "head")
    torch.manual_seed(6)
    again, report = PerformerModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]
    assert_same(again.state_dict(), model.performer.state_dict())


def test_features_missing_from_a_file_are_drawn(tmp_path):
    """An exact Transformer's weights in a Performer: everything else is kept."""
    exact = build(PerformerForMaskedLM, "exact")
    exact.save_pretrained(tmp_path)
    config = PerformerConfig.from_pretrained(tmp_path, attention="favor-softmax")
    torch.manual_seed(5)
    model, report = PerformerForMaskedLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert len(report["missing_keys"]) == 2
    assert all(name.endswith("feature_map.weight") for name in report["missing_keys"])
    assert_same({name: model.state_dict()[name] for name in exact.state_dict()}, exact.state_dict())
    for weight in features(model).values():
        # Blocks of orthogonal rows, as drawn: not whatever was in memory.
        block = weight[0, : model.config.head_dim]
        rows = block / block.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
    first, second = features(model).values()
    assert not torch.equal(first, second)
