"""``python -m studies.accuracy``: what it writes and prints, and what it refuses."""

import json
import re

import pytest

from performers.convert.distillation import pretrained
from studies.accuracy.__main__ import app
from studies.pages import digits
from tests.benchmark.runs import break_backend, read_csv
from tests.cli import commands
from tests.studies.accuracy.runs import TINY, compare_few, pretrained_options

KERNEL = [
    "kernel", "--kernel-length", 20, "--anisotropic-length", 20, "--anisotropic-dim", 8,
    "--norms", 1, "--anisotropic-norms", 2, "--kernel-feature-counts", "8,16", "--draws", 2,
    "--projections", "orthogonal,gaussian", "--estimators", "positive,trigonometric,data_aware",
]  # fmt: skip
FILES = ["benchmark.png", "benchmark.svg", "results.csv", "results.json"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setattr("performers.cli.benchmark.output.width", 200)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(
        "performers.app.figures.save_figure",
        lambda figure, path: path.write_text(f"{len(figure.axes)} panels"),
    )


def run(*arguments, **options):
    return commands.run(*arguments, app=app, **options)


def refusal(*arguments):
    return commands.refusal(*arguments, app=app)


def given(folder, family):
    """Options of a tiny model and its texts."""
    options = pretrained_options(folder, family)
    values = {name: getattr(options, name) for name in ("model", "text", "calibration")} | TINY
    values["feature_counts"] = "8,16"
    return [part for name, x in values.items() for part in (f"--{name.replace('_', '-')}", x)]


def read(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    content = json.loads((folder / "results.json").read_text())
    assert len(read_csv((folder / "results.csv").read_text())) == len(content["rows"]) > 0
    return content


def test_the_kernel(tmp_path, undrawn):
    out, lines = run(*KERNEL, "--output", tmp_path)
    content, text = read(tmp_path), " ".join(out.split())
    assert (tmp_path / "benchmark.png").read_text() == "12 panels"
    assert content["benchmark"] == "accuracy kernel"
    assert len(content["rows"]) == 2 * 2 * 3 * 2
    assert "anisotropic 2: output" in text
    shown = digits(content["rows"][0]["output_mse"])
    assert re.search(rf"isotropic 1 +positive +orthogonal +{re.escape(shown)} ", out)
    assert any(re.match(r"benchmark accuracy kernel: \d+ of 8", line) for line in lines)


def test_heads_and_models(tmp_path, undrawn, monkeypatch):
    compare_few(monkeypatch, 3)
    options = given(tmp_path, "llama")
    out, lines = run("heads", *options, "--layers", 1, "--output", tmp_path / "heads")
    assert read(tmp_path / "heads")["benchmark"] == "accuracy heads"
    words = ("layers", "on the front", "SDPA")
    assert all(word in out for word in words)
    assert any(line.startswith("benchmark accuracy heads: 2 of 2") for line in lines)
    out, _ = run("models", *options, "--output", tmp_path / "models")
    assert read(tmp_path / "models")["benchmark"] == "accuracy models"
    words = ("exact attention", "perplexity", "data_aware, window 8, 2 sinks")
    assert all(word in out for word in words)
    out, _ = run("plan", *options, "--layers", 1, "--output", tmp_path / "plan")
    (row,) = read(tmp_path / "plan")["rows"]
    assert row["layer"] == 1
    assert f"{row['error'] / row['promised']:.2f}" in out


def test_a_wrong_backend_ends_with_code_1(tmp_path, undrawn, monkeypatch):
    def attend(right, problem):
        out, state = right(problem)
        return out * 2, state

    break_backend(monkeypatch, "torch", attend)
    options = [*given(tmp_path, "bert"), "--output", tmp_path / "out"]
    out, lines = run("heads", *options, "--layers", 0, code=1)
    assert any("failed: data_aware, " in line and "wrong result" in line for line in lines)
    words = "layer 0: wrong result: output differs from the reference by"
    assert words in " ".join(out.split())


def test_results_are_resumed(tmp_path, undrawn, monkeypatch):
    compare_few(monkeypatch)
    arguments = ["models", *given(tmp_path, "bert"), "--output", tmp_path / "out"]
    run(*arguments)
    before = read(tmp_path / "out")["rows"]
    assert "--resume to continue" in refusal(*arguments)
    _, lines = run(*arguments, "--resume")
    assert "8 rows kept" in "\n".join(lines)
    assert read(tmp_path / "out")["rows"] == before
    _, lines = run(*arguments, "--keys", 5, "--resume", code=2)
    assert "measured with keys 4, this is 5; give another folder" in lines[-1]


def test_a_model_without_head_has_no_perplexity(tmp_path, undrawn, monkeypatch):
    compare_few(monkeypatch)
    options = given(tmp_path, "bert")
    loaded = pretrained.load_model(options[1], head=False)
    loaded.model.save_pretrained(options[1])
    out, lines = run("models", *options, "--output", tmp_path / "out")
    assert "has no language-modelling head: hidden states only" in lines[0]
    assert "cosine" in out
    assert "perplexity" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernel", "--draws", "0"], "--draws must be at least 1"),
        (["kernel", "--norms", "a"], "--norms must be whole numbers"),
        (["kernel", "--kernel-feature-counts", "7"], "--kernel-feature-counts must be even"),
        (["kernel", "--estimators", "best"], "--estimators must be one of positive"),
        (
            ["kernel", "--estimators", "hyperbolic", "--projections", "antithetic"],
            "--projections must have one besides antithetic for hyperbolic",
        ),
        (
            ["heads", "--model", "a", "--text", "b", "--num-features", "15"],
            "--num-features must be even and positive, got 15",
        ),
        (["heads", "--model", "a"], "--text"),
        (["models", "--model", "a", "--text", "b"], "a: no such model folder or .gguf file"),
        (["heads", "--model", "a", "--text", "b", "--backend", "cuda"], "--backend must be one of"),
        (["heads", "--model", "a", "--text", "b", "--length", "60"], "--length must exceed window"),
    ],
)
def test_bad_options_name_their_flag(arguments, words, tmp_path):
    assert words in refusal(*arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_texts_are_one_line(tmp_path):
    options, out = given(tmp_path, "bert"), tmp_path / "out"
    line = refusal("models", *options, "--passages", 30, "--output", out)
    assert re.search(r"text\.txt has 200 tokens, enough for 6 windows of 32; 30 were", line)
