"""Saving and loading: safetensors only, features included, through every door."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from performers.features import FeatureMap
from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerModel,
)
from tests.models.cases import FULL, make_config, tokens

CLASSES = {
    PerformerModel: AutoModel,
    PerformerForMaskedLM: AutoModelForMaskedLM,
    PerformerForCausalLM: AutoModelForCausalLM,
    PerformerForSequenceClassification: AutoModelForSequenceClassification,
}
KINDS = pytest.mark.parametrize("model_class", CLASSES)


def build(model_class=PerformerForMaskedLM, *, seed=0, **options):
    torch.manual_seed(seed)
    return model_class(make_config(**options)).eval()


def outputs(model):
    output = model(tokens(2, 9), return_dict=True)
    return output.last_hidden_state if isinstance(model, PerformerModel) else output.logits


def features(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, FeatureMap) and module.weight is not None
    }


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@KINDS
def test_a_saved_model_loads_exactly(tmp_path, model_class):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert names <= {"model.safetensors", "config.json", "generation_config.json"}
    for loaded in (
        model_class.from_pretrained(tmp_path),
        CLASSES[model_class].from_pretrained(tmp_path),
    ):
        assert type(loaded) is model_class
        assert_equal_states(loaded.state_dict(), model.state_dict())
        assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("attention", FULL)
def test_features_are_saved(tmp_path, attention):
    """Whatever the seed of the process that loads them."""
    model = build(attention=attention, features_per_head=True)
    for feature_map in features(model).values():
        feature_map.add_(1.0)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert len(features(model)) == (2 if attention.startswith("favor") else 0)
    assert_equal_states(features(loaded), features(model))
    weights = load_file(tmp_path / "model.safetensors")
    saved = {name for name in weights if "feature_map" in name}
    assert len(saved) == len(features(model))


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "hyperbolic", "num_features": 24},
        {"estimator": "trigonometric"},
        {"projection": "gaussian", "regularized": True},
        {"attention": "favor-elu+1", "projection": None},
        {"attention": "favor-exp", "kernel_epsilon": 0.5},
        {"features_per_head": True, "position_embedding": "learned"},
        {"tie_word_embeddings": False, "rope_theta": 500.0},
    ],
    ids=str,
)
def test_options_survive_saving(tmp_path, options):
    model = build(**options)
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in options} == options
    assert torch.equal(outputs(loaded), outputs(model))


def test_no_pickle_is_written_or_read(tmp_path):
    model = build()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for loader in (PerformerForMaskedLM, AutoModelForMaskedLM):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            loader.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="use_safetensors"):
            loader.from_pretrained(tmp_path, use_safetensors=False)
    # Beside a good file it is ignored.
    good = build(seed=1)
    good.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert_equal_states(loaded.state_dict(), good.state_dict())


def test_shards_are_safetensors_too(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert_equal_states(loaded.state_dict(), model.state_dict())


FRESH = """
import sys, torch
import performers.models
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

folder = sys.argv[1]
torch.manual_seed(1234)
for name, auto in (
    ("PerformerModel", AutoModel),
    ("PerformerForMaskedLM", AutoModelForMaskedLM),
    ("PerformerForCausalLM", AutoModelForCausalLM),
    ("PerformerForSequenceClassification", AutoModelForSequenceClassification),
):
    assert AutoConfig.from_pretrained(f"{folder}/{name}").model_type == "performer"
    model = auto.from_pretrained(f"{folder}/{name}")
    assert type(model).__name__ == name
    expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
    with torch.no_grad():
        output = model(expected["ids"], return_dict=True)
    found = output.last_hidden_state if name == "PerformerModel" else output.logits
    torch.testing.assert_close(found, expected["out"], rtol=1e-6, atol=1e-6)
print("all equal")
"""


@pytest.mark.exhaustive
def test_a_fresh_process_loads_the_same_models(tmp_path):
    for model_class in CLASSES:
        model = build(model_class)
        model.save_pretrained(tmp_path / model_class.__name__)
        expected = {"ids": tokens(2, 9), "out": outputs(model).detach()}
        torch.save(expected, tmp_path / f"{model_class.__name__}.pt")
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "all equal" in result.stdout


@pytest.mark.parametrize("model_class", [PerformerForMaskedLM, PerformerForCausalLM])
def test_tied_embeddings_stay_tied(tmp_path, model_class):
    model = build(model_class)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len({"lm_head.weight", "performer.embeddings.weight"} & set(file.keys())) == 1
    loaded = model_class.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    apart = build(model_class, tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.get_input_embeddings().weight
    apart.save_pretrained(tmp_path / "apart")
    loaded = model_class.from_pretrained(tmp_path / "apart")
    assert_equal_states(loaded.state_dict(), apart.state_dict())
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_loading_in_half_precision(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        # A rounded projection is no longer orthogonal.
        dtype = torch.float32 if "feature_map" in name else torch.bfloat16
        assert loaded.state_dict()[name].dtype == dtype, name
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype)), name
    error = (outputs(loaded).float() - outputs(model)).norm() / outputs(model).norm()
    assert error < 0.05
    loaded.save_pretrained(tmp_path / "half")
    again = PerformerForMaskedLM.from_pretrained(tmp_path / "half")
    assert_equal_states(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [40, 20])
def test_resized_embeddings(tmp_path, size, tied):
    model = build(tie_word_embeddings=tied)
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


@pytest.mark.parametrize(
    "head", [PerformerForMaskedLM, PerformerForCausalLM, PerformerForSequenceClassification]
)
def test_a_base_model_gets_a_head(tmp_path, head):
    base = build(PerformerModel)
    base.save_pretrained(tmp_path)
    torch.manual_seed(5)
    model, report = head.from_pretrained(tmp_path, output_loading_info=True)
    assert_equal_states(model.performer.state_dict(), base.state_dict())
    missing = {name.split(".")[0] for name in report["missing_keys"]}
    assert missing <= {"lm_head", "classifier"}
    assert not report["unexpected_keys"]
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 3, name
    if head is PerformerForSequenceClassification:
        assert model.classifier.weight.std() > 0.1
        assert (model.classifier.bias == 0).all()
    else:
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert (model.lm_head.bias == 0).all()


@pytest.mark.parametrize(
    "head", [PerformerForMaskedLM, PerformerForCausalLM, PerformerForSequenceClassification]
)
def test_a_base_model_is_taken_out_of_a_head(tmp_path, head):
    model = build(head)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    base, report = PerformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert_equal_states(base.state_dict(), model.performer.state_dict())
    assert torch.equal(outputs(base), model.performer(tokens(2, 9)).last_hidden_state)


def test_features_missing_from_a_file_are_drawn(tmp_path):
    """An exact Transformer's weights in a Performer: everything else is kept."""
    exact = build(attention="exact")
    exact.save_pretrained(tmp_path)
    config = PerformerConfig.from_pretrained(tmp_path, attention="favor-softmax")
    torch.manual_seed(5)
    model, report = PerformerForMaskedLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert len(report["missing_keys"]) == 2
    assert all(name.endswith("feature_map.weight") for name in report["missing_keys"])
    for name, tensor in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for weight in features(model).values():
        # Blocks of orthogonal rows, as drawn: not whatever was in memory.
        block = weight[0, : model.config.head_dim]
        rows = block / block.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
    first, second = features(model).values()
    assert not torch.equal(first, second)


def test_copies_are_independent():
    model = build()
    twin = copy.deepcopy(model)
    assert_equal_states(twin.state_dict(), model.state_dict())
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    expected = outputs(model)
    for weight in features(twin).values():
        weight.zero_()
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(outputs(model), expected)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        PerformerForMaskedLM.from_pretrained(tmp_path)
    build().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(Exception, match=r"(?i)header"):
        PerformerForMaskedLM.from_pretrained(tmp_path)
