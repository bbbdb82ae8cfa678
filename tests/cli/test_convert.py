"""``performers convert``: what it writes and prints, what it resumes, and what it refuses."""

import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import transformers

from performers.benchmark.settings import Sampling
from performers.cli import convert_run as command
from performers.convert import load_performer, to_performer
from performers.convert.distillation import pipeline, training
from performers.convert.distillation.pretrained import load_model
from tests.benchmark.tiny_models import residues, save_bert, save_llama, words
from tests.cli.commands import refusal
from tests.cli.commands import run as run_command

SMALL = [
    "--window", 4, "--num-features", 8, "--length", 24, "--calibration", 4, "--test", 6,
    "--batch-size", 2, "--transfer-steps", 2, "--steps", 4, "--eval-steps", 2, "--save-steps", 1,
    "--lengths", "32,64", "--no-memory",
]  # fmt: skip
FILES = [
    "config.json", "conversion.json", "conversion.md", "conversion.png", "manifest.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


UNTRAINED = ["--steps", 0, "--transfer-steps", 0, "--no-speed"]


def draw_nothing(figure, path):
    path.write_text(f"{len(figure.axes)} panels")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """A wide terminal, times of two rounds, and of few steps of decoding."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "200")
        patched.setattr(command, "SPEED", Sampling(repeats=2, min_time=0.0))
        patched.setattr(command, "_STEPS", 2)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(command, "save_figure", draw_nothing)


def make_causal(folder):
    (folder / "text.txt").write_text(words(3000, 1))
    return [save_llama(folder / "llama"), "--data", folder / "text.txt"]


def make_masked(folder):
    records = [f">p{i}\n{residues(8 + i % 30, i)}\n" for i in range(80)]
    (folder / "proteins.fasta").write_text("".join(records))
    return [save_bert(folder), "--data", folder / "proteins.fasta"]


@pytest.fixture
def causal(tmp_path):
    return make_causal(tmp_path)


@pytest.fixture
def masked(tmp_path):
    return make_masked(tmp_path)


class Conversion:
    """A finished run: its arguments, its folder and what it printed."""

    def __init__(self, files, folder, *options):
        self.arguments = ["convert", *files, *SMALL, *options]
        self.files, self.folder = files, folder
        self.out, self.lines = run_command(*self.arguments, "--output", folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder, converted, trained and measured."""
    folder = tmp_path_factory.mktemp("decoder")
    return Conversion(make_causal(folder), folder / "out")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder of 40 positions, converted for 60 and not trained."""
    folder = tmp_path_factory.mktemp("encoder")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "save_figure", draw_nothing)
        options = [*UNTRAINED, "--length", 60, "--window", 0, "--test", "0.25"]
        return Conversion(make_masked(folder), folder / "out", *options)


def read(folder):
    return json.loads((folder / "conversion.json").read_text())


def names(content):
    return [row["model"] for row in content["quality"]]


def test_a_decoder_is_converted_measured_and_saved(decoder):
    folder, out, lines = decoder.folder, decoder.out, decoder.lines
    assert sorted(path.name for path in folder.iterdir() if path.name in FILES) == FILES
    assert not (folder / "training").exists(), "checkpoints are of no use any more"
    content = read(folder)
    assert names(content) == ["original", "FAVOR+ alone", "converted", "converted, fine-tuned"]
    assert content["model"]["kind"] == "causal"
    assert content["options"]["sinks"] == 4
    assert content["options"]["loss"] == "logits"
    assert "divergence" not in content["quality"][0]
    for row in content["quality"][1:]:
        assert row["divergence"] > 0
        assert row["perplexity"] > 1
    training = content["training"]
    stages = [(x["stage"], x["step"]) for x in training["history"] if "perplexity" in x]
    assert stages == [("transfer", 2), ("model", 2), ("model", 4)]
    assert training["tokens"] == pytest.approx((2 + 4) * 2 * 24, abs=4 * 24)
    assert training["seconds"] > 0
    assert [(row["length"], row["model"]) for row in content["speed"]] == [
        (32, "original"), (32, "converted"), (64, "original"), (64, "converted"),
    ]  # fmt: skip
    assert {row["status"] for row in content["speed"] + content["decoding"]} == {"measured"}
    for name in (*names(content), "after attention transfer", "Forward pass", "Decoding"):
        assert name in out
    assert f"{content['quality'][3]['perplexity']:.3f}" in out
    assert "2 steps of attention transfer and 4 steps of fine-tuning" in out
    assert out.splitlines()[-1] == f"report: {folder / 'conversion.md'}"
    page = (folder / "conversion.md").read_text()
    assert "window 4, sinks 4, listed_keys 0, num_features 8, estimator data_aware" in page
    assert "![" in page
    assert any(line.startswith("training, model: 4 of 4") for line in lines)
    assert not any("Writing" in line or "Warning" in line for line in lines)


def test_an_encoder_that_is_not_trained_has_its_weights_and_longer_positions(encoder):
    content = read(encoder.folder)
    assert names(content) == ["original", "FAVOR+ alone", "converted"]
    options, expected = content["options"], {"window": None, "test": 0.25, "length": 60}
    assert {name: options[name] for name in expected} == expected
    assert content["training"] == {}
    assert content["speed"] == []
    assert "Training:" not in encoder.out
    assert (encoder.folder / "conversion.png").read_text() == "1 panels"
    model = load_performer(encoder.folder)
    for name, weight in load_model(encoder.files[0]).model.named_parameters():
        if "position" not in name:
            assert torch.equal(model.get_parameter(name), weight), name
    assert model.config.max_position_embeddings == 60
    table = model.base_model.embeddings.position_embeddings.weight
    assert torch.equal(table[40:], table[:20])
    card = (encoder.folder / "README.md").read_text()
    assert "Positions: 40 of the original, repeated up to 60." in card
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder.folder)
    assert tokenizer.model_max_length >= 60


@pytest.mark.exhaustive
def test_proteins_and_a_table_of_positions(masked, tmp_path, undrawn):
    """BERT's 40 positions are fewer than the lengths at which speed is measured."""
    folder = tmp_path / "out"
    out, _ = run_command("convert", *masked, "--output", folder, *SMALL, "--max-positions", 50)
    content = read(folder)
    assert content["model"]["kind"] == "masked"
    assert content["options"]["sinks"] == 0
    assert content["options"]["max_positions"] == 50
    assert content["decoding"] == []
    assert {row["status"] for row in content["speed"]} == {"measured"}
    assert "Decoding" not in out
    assert 0 <= content["quality"][0]["accuracy"] <= 1
    model = load_performer(folder)
    assert model.config.max_position_embeddings == 50
    with torch.no_grad():
        assert model(input_ids=torch.full((1, 50), 6)).logits.shape == (1, 50, 25)
    assert (folder / "conversion.png").read_text() == "2 panels"


def test_another_run_is_not_resumed(masked, tmp_path, undrawn):
    arguments = ["convert", *masked, *SMALL, "--no-speed", "--output", tmp_path / "out"]
    arguments += ["--layers", "0,-1", "--estimator", "positive", "--listed-keys", 6]
    run_command(*arguments, *UNTRAINED)
    assert read(tmp_path / "out")["options"]["listed_keys"] == 6
    record = load_performer(tmp_path / "out").config.performers
    assert record["layers"] == [0, -1]
    assert record["estimator"] == "positive"
    assert record["listed_keys"] == 6
    line = refusal(*arguments, "--resume", "--seed", 3)
    assert "transfer_steps was 0, now 2; steps was 0, now 4; seed was 0, now 3" in line
    masked[2].write_text(masked[2].read_text() + f">other\n{residues(30, 99)}\n")
    assert "data_sha256 was" in refusal(*arguments, "--resume", *UNTRAINED)


def test_an_interrupted_training_is_resumed_to_the_same_model(decoder, tmp_path, undrawn):
    arguments = [*decoder.arguments, "--no-speed"]
    whole, original = read(decoder.folder), pipeline.distill

    def interrupted(*given, progress, **options):
        def stop(stage, step, total, log):
            progress(stage, step, total, log)
            if (stage, step) == ("model", 2) and not log:
                os.kill(os.getpid(), signal.SIGINT)

        return original(*given, progress=stop, **options)

    folder = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "distill", interrupted)
        out, lines = run_command(*arguments, "--output", folder, code=130)
    assert out == ""
    assert lines[-1].startswith("performers: interrupted; what is done is in ")
    assert "--resume" in lines[-1]
    assert names(read(folder)) == ["original", "FAVOR+ alone", "converted"]
    assert "--resume to continue" in refusal(*arguments, "--output", folder)
    out, lines = run_command(*arguments, "--output", folder, "--resume")
    assert "3 measurements kept" in "\n".join(lines)
    resumed = read(folder)
    assert names(resumed) == names(whole)
    for row, expected in zip(resumed["quality"], whole["quality"], strict=True):
        assert row["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert [(x["stage"], x["step"]) for x in resumed["training"]["history"]] == [
        (x["stage"], x["step"]) for x in whole["training"]["history"]
    ]


def test_a_finished_run_is_not_done_again(decoder, undrawn, monkeypatch):
    before = read(decoder.folder)
    # A run older than an option goes on with its default.
    older = {**before, "options": dict(before["options"]), "speed": [], "decoding": []}
    assert older["options"].pop("listed_keys") == 0
    (decoder.folder / "conversion.json").write_text(json.dumps(older))
    for name in ("distill", "measure_quality", "to_performer"):
        monkeypatch.delattr(pipeline, name)
    out, lines = run_command(*decoder.arguments, "--output", decoder.folder, "--resume")
    assert "4 measurements kept" in "\n".join(lines)
    after = read(decoder.folder)
    assert after["quality"] == before["quality"]
    assert len(after["speed"]) == 4
    assert "Forward pass" in out


def test_adapters_without_peft_are_refused_at_once(causal, tmp_path, monkeypatch):
    missing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(training, "importlib", missing)
    monkeypatch.delattr(pipeline, "measure_quality")
    line = refusal("convert", *causal, *SMALL, "--lora-rank", 4, "--output", tmp_path / "out")
    assert "lora_rank needs peft" in line


def test_another_original_under_the_same_path_is_not_resumed(encoder, undrawn):
    arguments = [*encoder.arguments, "--output", encoder.folder, "--resume"]
    file = encoder.files[0] / "model.safetensors"
    before = file.read_bytes()
    model = transformers.AutoModelForMaskedLM.from_pretrained(encoder.files[0])
    model.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(encoder.files[0])
    assert "model_sha256 was" in refusal(*arguments)
    # Records of earlier versions have no hash.
    report = encoder.folder / "conversion.json"
    whole = report.read_bytes()
    record = json.loads(whole)
    del record["options"]["model_sha256"]
    report.write_text(json.dumps(record))
    _, lines = run_command(*arguments)
    assert "3 measurements kept" in "\n".join(lines)
    file.write_bytes(before)
    report.write_bytes(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--estimator", "best"], "--estimator must be one of"),
        (["--num-features", "0"], "--num-features must be at least 1"),
        (["--layers", "a"], "--layers must be whole numbers"),
        (["--layers", "3"], "layers must be in 0..2"),
        (["--listed-keys", "6"], "listed_keys=6 is for encoders among transformers models"),
        (["--test", "many"], "--test must be a number"),
        (["--length", "1000"], "too little text"),
        (["--lengths", "64,32"], "--lengths must be"),
    ],
)
def test_bad_options_are_one_line(causal, arguments, message, tmp_path):
    options = [*SMALL, *arguments]
    _, lines = run_command("convert", *causal, "--output", tmp_path / "out", *options, code=2)
    assert message in lines[-1]
    assert lines[-1].startswith("performers: ")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_models_and_data_are_one_line(causal, masked, tmp_path):
    out = ["--output", tmp_path / "out"]
    assert re.match(r"MODEL .*absent does not exist", refusal(
        "convert", tmp_path / "absent", *causal[1:], *out
    ))  # fmt: skip
    line = refusal("convert", causal[0], "--data", tmp_path / "absent.txt", *out)
    assert line.startswith("--data ")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal("convert", tmp_path / "empty", *causal[1:], *out)
    (tmp_path / "out").rmdir()
    to_performer(model := load_model(causal[0]).model, num_features=8)
    converted = shutil.copytree(causal[0], tmp_path / "converted")
    model.save_pretrained(converted)
    line = refusal("convert", converted, *causal[1:], *out)
    assert "holds a converted model: pass its original" in line
    (causal[0] / "tokenizer.json").unlink()
    (causal[0] / "tokenizer_config.json").unlink()
    assert "has no tokenizer files" in refusal("convert", *causal, *out)
    assert not (tmp_path / "out" / "config.json").exists()


def test_several_processes_are_refused(causal, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal("convert", *causal, *SMALL, "--output", tmp_path / "out")
    assert line.startswith("performers convert runs in one process")
    assert not (tmp_path / "out").exists()
