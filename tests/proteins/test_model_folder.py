"""Model folders: what is saved loads as it was; what is not one is refused with a reason."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, EsmConfig

from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.models.manifest import save_model_folder
from performers.proteins.errors import UserError
from performers.proteins.model_folder import (
    check_input_length,
    load_model,
    model_max_length,
    quiet_transformers,
)
from performers.proteins.tokenizer import build_protein_tokenizer
from tests.proteins.runs import make_model, make_model_folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def saved(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def folder(saved):
    """Without its manifest, as of a version that wrote none."""
    (saved / "manifest.json").unlink()
    return saved


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message[len(str(folder)) :]


@pytest.mark.parametrize(
    ("objective", "kind"), [("mlm", PerformerForMaskedLM), ("clm", PerformerForCausalLM)]
)
def test_a_saved_model_comes_back(tmp_path, objective, kind):
    model, tokenizer = make_model(objective, max_length=77)
    save_model_folder(tmp_path, model, tokenizer)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    loaded, reader = load_model(tmp_path)
    assert type(loaded) is kind
    assert not loaded.training
    assert model_max_length(reader) == 77
    tokens = torch.tensor([reader("MKTWX")["input_ids"]])
    assert torch.equal(loaded.cpu()(tokens).logits, model(tokens).logits)


def test_transformers_loads_it_too(good):
    model = AutoModelForMaskedLM.from_pretrained(good)
    tokenizer = AutoTokenizer.from_pretrained(good)
    ours, _ = load_model(good)
    tokens = torch.tensor([tokenizer("MKT")["input_ids"]])
    assert torch.equal(model(tokens).logits, ours.cpu()(tokens).logits)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_changed_byte_is_noticed_and_can_be_accepted(saved, name):
    path = saved / name
    content = bytearray(path.read_bytes())
    if name == "model.safetensors":
        content[-9] ^= 1
    else:
        content[content.rindex(b"\n")] = ord(" ")
    path.write_bytes(content)
    message = refusal(saved)
    assert message.startswith(f": {name} does not match its SHA-256 in manifest.json; ")
    assert "delete manifest.json there if the change is intended" in message
    (saved / "manifest.json").unlink()
    load_model(saved)


def test_a_manifest_covers_what_was_saved_and_nothing_else(tmp_path):
    (tmp_path / "training.json").write_text("{}")
    save_model_folder(tmp_path, *make_model())
    listed = json.loads((tmp_path / "manifest.json").read_text())["files"]
    saved = {path.name for path in tmp_path.iterdir()} - {"manifest.json", "training.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved == listed.keys()
    (tmp_path / "training.json").write_text("[]")
    load_model(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 7, "files": {}}'])
def test_a_damaged_manifest_is_refused(saved, content):
    (saved / "manifest.json").write_text(content)
    assert refusal(saved).startswith(": manifest.json ")


def test_a_failed_save_leaves_no_model(tmp_path, monkeypatch):
    model, tokenizer = make_model()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        save_model_folder(tmp_path, model, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_length_without_limit_has_a_default():
    assert model_max_length(build_protein_tokenizer()) == 1024


def test_missing_and_empty_folders(tmp_path):
    assert "is not a model folder" in refusal(tmp_path / "none")
    assert "it has no config.json" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "is not a model folder" in refusal(tmp_path / "file")


def test_a_run_that_has_not_ended(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "finish it with performers train --resume" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert refusal(folder) == f" has no {name}; copy the folder again or train anew"


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"garbage" * 30, None])
def test_corrupt_weights(folder, content):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10] if content is None else content)
    assert "cannot be loaded as a model" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", "", "\x00"])
def test_a_corrupt_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "cannot be loaded as a model" in refusal(folder)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(", "unmatched parenthesis"), ("(?!)", "is read as [3]"), ("W", "is read as [3, 23, 24]")],
)
def test_a_tokenizer_that_does_not_split_into_residues(folder, pattern, reason):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pattern"]["Regex"] = pattern
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(folder)
    assert message.startswith(" cannot be loaded as a model (tokenizer.json: ")
    assert reason in message


def test_a_tokenizer_of_something_else(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w"] = vocabulary.pop("W")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "W not found" in refusal(folder)


def test_a_tokenizer_larger_than_the_model(tmp_path):
    make_model_folder(tmp_path / "model", vocab_size=30)
    assert "a tokenizer of 31 tokens but a model of 30" in refusal(tmp_path / "model")


@pytest.mark.parametrize("content", [b"not json", b"", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "/config.json cannot be read as JSON" in refusal(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_config_that_is_no_file_is_not_opened(folder, make):
    (folder / "config.json").unlink()
    make(folder / "config.json")
    assert refusal(folder) == "/config.json is not a regular file"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "bert"}, "holds a model of type 'bert', expected 'performer'"),
        ({"model_type": None}, "holds a model of type None"),
        ({"attention": "bogus"}, "attention must be one of"),
        ({"hidden_size": "wide"}, "cannot be loaded as a model"),
        ({"hidden_size": 32}, "cannot be loaded as a model"),
        ({"hidden_act": "bogus"}, "cannot be loaded as a model"),
        ({"num_hidden_layers": 3}, "weights that do not fit its config.json"),
        ({"num_hidden_layers": 1}, "weights that do not fit its config.json"),
        ({"architectures": None}, None),
    ],
)
def test_a_config_that_does_not_fit(folder, change, reason):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    if reason is None:
        load_model(folder)
    else:
        assert reason in refusal(folder)


def test_a_config_that_is_a_list(folder):
    (folder / "config.json").write_text("[1]")
    assert "holds a model of type None" in refusal(folder)


def test_weights_with_one_missing_are_not_filled_in_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "1 missing or too many, such as lm_head.bias" in refusal(folder)


def test_learned_positions_end_and_others_do_not():
    model, _ = make_model(position_embedding="learned", max_length=40)
    check_input_length(model, 40)
    with pytest.raises(UserError, match="learned positions for 40 tokens and cannot read 41"):
        check_input_length(model, 41)
    for positions in ("rotary", "sinusoidal"):
        check_input_length(make_model(position_embedding=positions)[0], 10**6)


def test_models_of_other_families_refuse_by_themselves():
    class Other:
        config = EsmConfig(max_position_embeddings=40)

    check_input_length(Other(), 41)


def test_quiet_is_for_a_while_only():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
