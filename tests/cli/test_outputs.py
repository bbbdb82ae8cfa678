"""Where commands write, and what they read a model from: refused before the work is done."""

import shutil

import pytest

from tests.cli.commands import refusal, run
from tests.proteins.runs import flags


def writing(command, fasta, masked, causal):
    """A command without its output."""
    return {
        "train": ["train", fasta, *flags(steps=1)],
        "report": ["report", masked, fasta],
        "demo": ["demo", "--steps", 1],
        "embed": ["embed", masked, fasta],
        "generate": ["generate", causal, "--max-length", 20],
    }[command]


@pytest.fixture
def arguments(request, fasta, masked, causal):
    return writing(request.param, fasta, masked, causal)


FOLDERS = pytest.mark.parametrize("arguments", ["train", "report", "demo"], indirect=True)


@FOLDERS
def test_a_folder_that_is_a_file(arguments, tmp_path):
    (tmp_path / "file").write_text("kept")
    line = refusal(*arguments, "--output", tmp_path / "file")
    assert line == f"--output {tmp_path / 'file'} is a file; give a folder"
    assert (tmp_path / "file").read_text() == "kept"


@FOLDERS
def test_a_folder_that_is_not_empty(arguments, tmp_path):
    (tmp_path / "x").write_text("kept")
    line = refusal(*arguments, "--output", tmp_path)
    assert line.startswith(f"--output {tmp_path} is not empty; give another folder")
    assert ("--resume" in line) is (arguments[0] != "report")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@FOLDERS
@pytest.mark.parametrize("place", ["file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written(arguments, tmp_path, place):
    (tmp_path / "file").touch()
    line = refusal(*arguments, "--output", tmp_path / place)
    assert line.startswith(f"--output {tmp_path / place} cannot be written (")


@pytest.mark.parametrize(
    ("arguments", "suffix"), [("embed", ".npz"), ("generate", ".fasta")], indirect=["arguments"]
)
def test_files_that_cannot_be_written(arguments, suffix, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / f"folder{suffix}").mkdir()
    below = tmp_path / "file" / f"x{suffix}"
    assert f"{below.parent} is not a folder" in refusal(*arguments, "--output", below)
    assert "cannot be written" in refusal(*arguments, "--output", f"/proc/none/x{suffix}")
    folder = refusal(*arguments, "--output", tmp_path / f"folder{suffix}")
    assert folder.endswith("is a folder; give a file")
    wrong = refusal(*arguments, "--output", tmp_path / "x.txt")
    assert "x.txt must end with " in wrong
    assert suffix in wrong
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{suffix}"]


def reading(command, model, fasta, tmp_path):
    return {
        "evaluate": ["evaluate", model, fasta],
        "embed": ["embed", model, fasta, "--output", tmp_path / "x.npz"],
        "generate": ["generate", model],
        "report": ["report", model, fasta, "--output", tmp_path / "report"],
    }[command]


@pytest.mark.parametrize("command", ["evaluate", "embed", "generate", "report"])
def test_a_model_folder_that_is_not_one(command, causal, fasta, tmp_path):
    def refused(folder):
        line = refusal(*reading(command, folder, fasta, tmp_path))
        assert line.startswith(str(folder))
        return line

    words = "is not a model folder" if command == "generate" else "no such file or folder"
    assert words in refused(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in refused(tmp_path / "empty")
    broken = shutil.copytree(causal, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing of the kind")
    assert "model.safetensors has 19 bytes, expected" in refused(broken)
    (broken / "manifest.json").unlink()
    assert "cannot be loaded as a model" in refused(broken)
    (broken / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(broken)
    (broken / "config.json").write_text('{"model_type": "bert"}')
    assert "holds a model of type 'bert'" in refused(broken)
    bare = shutil.copytree(causal, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(bare)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "broken", "empty"]


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("train", "training.train.train_model"),
        ("train", "inputs.fasta.read_fasta"),
        ("evaluate", "scoring.evaluation.evaluate_model"),
        ("evaluate", "model_folder.load_model"),
        ("embed", "scoring.embedding.embed_sequences"),
        ("generate", "scoring.generation.generate_sequences"),
        ("report", "report.model_report.report_on_model"),
    ],
)
def test_ctrl_c_anywhere_exits_with_130(command, function, fasta, causal, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"performers.proteins.{function}", interrupt)
    if command == "train":
        arguments = ["train", fasta, "--output", tmp_path / "model", *flags()]
    else:
        arguments = reading(command, causal, fasta, tmp_path)
    assert refusal(*arguments, code=130) == "interrupted"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/data/x"), "/data/x: No space left on device"),
        (MemoryError(), "out of memory; lower --batch-tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (ImportError("No module named 'pyarrow'"), "pip install 'performers[proteins]'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_machine_lacks_is_one_line(error, words, masked, fasta, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("performers.proteins.scoring.embedding.write_embeddings", fail)
    output = tmp_path / "x.npz"
    _, lines = run("embed", masked, fasta, "--output", output, code=2)
    assert words in lines[-1]
    assert not output.exists()
