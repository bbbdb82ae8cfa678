"""Model folders: what is saved loads as it was; what is not one is refused with a reason."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, EsmConfig

from performers.app.errors import UserError
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.models.manifest import save_model_folder
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from performers.proteins.model_folder import (
    check_input_length,
    load_model,
    model_max_length,
    quiet_transformers,
)
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
    ("objective", "kind", "auto"),
    [
        ("mlm", PerformerForMaskedLM, AutoModelForMaskedLM),
        ("clm", PerformerForCausalLM, AutoModelForCausalLM),
    ],
)
def test_a_saved_model_comes_back_and_transformers_loads_it_too(tmp_path, objective, kind, auto):
    model, tokenizer = make_model(objective, max_length=77)
    save_model_folder(tmp_path, model, tokenizer)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    loaded, reader = load_model(tmp_path)
    assert type(loaded) is kind
    assert not loaded.training
    assert model_max_length(reader) == 77
    tokens = torch.tensor([reader("MKTWX")["input_ids"]])
    theirs = auto.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("MKTWX")["input_ids"] == tokens[0].tolist()
    for network in (loaded.cpu(), theirs):
        assert torch.equal(network(tokens).logits, model(tokens).logits)


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


def changed(name, change):
    """A change of a JSON file."""

    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def configured(**values):
    return changed("config.json", lambda config: config.update(values))


def splitting(pattern):
    return changed(
        "tokenizer.json", lambda t: t["pre_tokenizer"]["pattern"].update({"Regex": pattern})
    )


def rename_tryptophan(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w"] = vocabulary.pop("W")


def drop_a_bias(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def replaced_by(make):
    def damage(folder):
        (folder / "config.json").unlink()
        make(folder / "config.json")

    return damage


UNLOADABLE, JSON = " cannot be loaded as a model", "/config.json cannot be read as JSON"
MISFIT = " has weights that do not fit its config.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *[
            (lambda folder, name=name: (folder / name).unlink(), f" has no {name}; copy the folder")
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
        ],
        (lambda folder: (folder / "config.json").unlink(), " is not a model folder: it has no c"),
        *[
            (written("manifest.json", content), ": manifest.json ")
            for content in (b"", b"[]", b'{"schema": 7, "files": {}}')
        ],
        *[
            (written("model.safetensors", content), UNLOADABLE)
            for content in (b"", b"\x00" * 100, b"garbage" * 30)
        ],
        (cut_short, UNLOADABLE),
        *[
            (written("tokenizer.json", content), UNLOADABLE)
            for content in (b"{", b"{}", b"[]", b"", b"\x00")
        ],
        (splitting("("), UNLOADABLE + r" (tokenizer.json: ... unmatched parenthesis"),
        (splitting("(?!)"), UNLOADABLE + " (tokenizer.json: ... is read as [3]"),
        (splitting("W"), UNLOADABLE + " (tokenizer.json: ... is read as [3, 23, 24]"),
        (changed("tokenizer.json", rename_tryptophan), UNLOADABLE + "... W not found"),
        *[
            (written("config.json", content), JSON)
            for content in (b"not json", b"", b"\xff\xfe", b"[" * 100_000)
        ],
        (written("config.json", b"[1]"), " holds a model of type None"),
        (replaced_by(os.mkfifo), "/config.json is not a regular file"),
        (replaced_by(os.mkdir), "/config.json is not a regular file"),
        (configured(model_type="bert"), " holds a model of type 'bert', expected 'performer'"),
        (configured(model_type=None), " holds a model of type None"),
        (configured(attention="bogus"), UNLOADABLE + "...attention must be"),
        *[
            (configured(**values), UNLOADABLE)
            for values in ({"hidden_size": "wide"}, {"hidden_size": 32}, {"hidden_act": "bogus"})
        ],
        *[(configured(num_hidden_layers=layers), MISFIT) for layers in (1, 3)],
        (drop_a_bias, MISFIT + " (1 missing or too many, such as lm_head.bias"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, message):
    """Without a manifest, as of a version that wrote none, unless it is what is damaged."""
    damage(folder)
    found = refusal(folder)
    first, *others = message.split("...")
    assert found.startswith(first)
    assert all(words in found for words in others)


def test_other_folders(tmp_path, folder):
    assert "is not a model folder" in refusal(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "is not a model folder" in refusal(tmp_path / "file")
    (tmp_path / "checkpoints").mkdir()
    assert "finish it with performers train --resume" in refusal(tmp_path)
    make_model_folder(tmp_path / "small", vocab_size=30)
    assert "a tokenizer of 31 tokens but a model of 30" in refusal(tmp_path / "small")
    configured(architectures=None)(folder)
    load_model(folder)
    assert model_max_length(build_protein_tokenizer()) == 1024, "a length without limit"


def test_a_failed_save_leaves_no_model(tmp_path, monkeypatch):
    model, tokenizer = make_model()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        save_model_folder(tmp_path, model, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_learned_positions_end_and_others_do_not():
    model, _ = make_model(position_embedding="learned", max_length=40)
    check_input_length(model, 40)
    with pytest.raises(UserError, match="learned positions for 40 tokens and cannot read 41"):
        check_input_length(model, 41)
    for positions in ("rotary", "sinusoidal"):
        check_input_length(make_model(position_embedding=positions)[0], 10**6)

    class Other:
        config = EsmConfig(max_position_embeddings=40)

    # Models of other families refuse by themselves.
    check_input_length(Other(), 41)


def test_quiet_is_for_a_while_only():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
