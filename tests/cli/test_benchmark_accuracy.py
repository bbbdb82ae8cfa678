"""``performers benchmark accuracy``: what it writes and prints, and what it refuses."""

import json
import re

import pytest

from performers.cli.benchmark_accuracy_tables import error
from performers.convert.distillation import pretrained
from tests.benchmark.pretrained_runs import pretrained_settings
from tests.benchmark.runs import break_backend, read_csv
from tests.cli.commands import refusal, run

ACCURACY = ["benchmark", "accuracy"]
KERNEL = [
    "--kernel-length", 20, "--anisotropic-length", 20, "--anisotropic-dim", 8, "--norms", 1,
    "--anisotropic-norms", 2,
    "--kernel-feature-counts", "8,16", "--draws", 2, "--projections", "orthogonal,gaussian",
    "--estimators", "positive,trigonometric,data_aware",
]  # fmt: skip
HEADS = [
    "--length", 32, "--window", 8, "--sinks", 2, "--keys", 4, "--num-features", 16,
    "--feature-counts", "8,16", "--repeats", 1, "--min-time", 0, "--backend", "torch",
]  # fmt: skip
FILES = ["benchmark.png", "benchmark.svg", "results.csv", "results.json"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setattr("performers.cli.benchmark_run.output.width", 200)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of the time, and one test draws them all."""
    monkeypatch.setattr(
        "performers.cli.benchmark_run.save_figure",
        lambda figure, path: path.write_text(f"{len(figure.axes)} panels"),
    )


def given(folder, family):
    """Options that name a tiny model and its texts."""
    settings = pretrained_settings(folder, family)
    return [
        "--model", settings.model, "--text", settings.text, "--calibration", settings.calibration,
    ]  # fmt: skip


def words(text):
    """A text whatever its line breaks."""
    return " ".join(text.split())


def read(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    content = json.loads((folder / "results.json").read_text())
    rows = read_csv((folder / "results.csv").read_text())
    assert len(rows) == len(content["rows"]) > 0
    return content


def test_without_a_model_it_measures_the_kernel(tmp_path, undrawn):
    out, lines = run(*ACCURACY, *KERNEL, "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kernel"]
    content = read(tmp_path / "out" / "kernel")
    assert (tmp_path / "out" / "kernel" / "benchmark.png").read_text() == "12 panels"
    assert content["benchmark"] == "accuracy kernel"
    assert len(content["rows"]) == 2 * 2 * 3 * 2
    assert "isotropic 1: squared relative error" in words(out)
    assert "anisotropic 2: relative error of the output" in words(out)
    assert all(name in out for name in ("trigonometric", "data_aware", "gaussian"))
    shown = error(content["rows"][0]["kernel_relative"])
    assert re.search(rf"positive +orthogonal +{re.escape(shown)} ", out)
    assert any(re.match(r"benchmark accuracy kernel: \d+ of 8", line) for line in lines)


def test_with_a_model_it_measures_all_three(tmp_path):
    options = [*KERNEL, *HEADS, *given(tmp_path, "llama")]
    out, lines = run(*ACCURACY, *options, "--output", tmp_path / "out")
    parts = ["heads", "kernel", "model"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == parts
    for part in parts:
        assert read(tmp_path / "out" / part)["benchmark"] == f"accuracy {part}"
    assert "relative error of the output by layer, 16 features" in out
    assert "front" in out
    assert "SDPA" in out
    assert "the end of the model" in out
    assert "perplexity" in out
    assert "data_aware, window 8, 2 sinks" in out
    assert any(line.startswith("benchmark accuracy heads: 4 of 4") for line in lines)


def test_a_wrong_backend_ends_with_code_1_after_all_parts(tmp_path, undrawn, monkeypatch):
    def attend(right, problem):
        out, state = right(problem)
        return out * 2, state

    break_backend(monkeypatch, "torch", attend)
    out, lines = run(
        *ACCURACY, *HEADS, *given(tmp_path, "bert"), "--part", "heads,model",
        "--output", tmp_path / "out", code=1,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heads", "model"]
    assert any("failed: data_aware, " in line and "wrong result" in line for line in lines)
    assert "layer 0: wrong result: output differs from the reference by" in words(out)
    assert "the end of the model" in out


def test_results_are_resumed(tmp_path, undrawn):
    arguments = [*ACCURACY, *HEADS, *given(tmp_path, "bert"), "--part", "model"]
    run(*arguments, "--output", tmp_path / "out")
    before = read(tmp_path / "out" / "model")["rows"]
    assert "--resume to continue" in refusal(*arguments, "--output", tmp_path / "out")
    _, lines = run(*arguments, "--resume", "--output", tmp_path / "out")
    assert "40 rows kept" in "\n".join(lines)
    assert read(tmp_path / "out" / "model")["rows"] == before
    _, lines = run(*arguments, "--keys", 5, "--resume", "--output", tmp_path / "out", code=2)
    assert "measured with keys 4, this is 5; give another folder" in lines[-1]


def test_a_model_without_head_has_no_perplexity(tmp_path, undrawn):
    options = given(tmp_path, "bert")
    loaded = pretrained.load_model(options[1])
    loaded.model.save_pretrained(options[1])
    out, lines = run(*ACCURACY, *HEADS, *options, "--part", "model", "--output", tmp_path / "out")
    assert "has no language-modelling head: hidden states only" in lines[0]
    assert "cosine" in out
    assert "perplexity" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "heads"], "--part heads needs --model and --text"),
        (["--part", "everything"], "--part must be one of kernel, heads, model; got 'everything'"),
        (["--model", "somewhere"], "--text is missing: --model was given"),
        (["--text", "somewhere"], "--model is missing: --text was given"),
        (["--draws", "0"], "--draws must be at least 1"),
        (["--norms", "a"], "--norms must be whole numbers"),
        (["--kernel-feature-counts", "7"], "--kernel-feature-counts must be even"),
        (["--estimators", "best"], "--estimators must be one of positive"),
        (["--model", "a", "--text", "b"], "a: no such model folder or .gguf file"),
        (["--model", "a", "--text", "b", "--backend", "cuda"], "--backend must be one of"),
        (["--model", "a", "--text", "b", "--length", "60"], "--length must exceed window"),
        (["--model", "a", "--text", "b", "--part", "kernel"], "not used with --part kernel"),
    ],
)
def test_bad_options_name_their_flag(arguments, words, tmp_path):
    assert words in refusal(*ACCURACY, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_models_and_texts_are_one_line(tmp_path, undrawn, monkeypatch):
    options, out = given(tmp_path, "bert"), tmp_path / "out"
    command = [*ACCURACY, *HEADS, "--part", "model"]
    line = refusal(*command, *options[:3], tmp_path / "absent.txt", "--output", out)
    assert "absent.txt: no such text file" in line
    line = refusal(*command, *options, "--passages", 30, "--output", out)
    assert re.search(r"text\.txt has 200 tokens, enough for 6 windows of 32; 30 were", line)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name, *rest: None)
    line = refusal(*command, "--model", tmp_path / "gguf", *options[2:], "--output", out)
    assert line.endswith("install it with pip install gguf")
    assert not out.exists()
    monkeypatch.undo()
    line = refusal(*command, *options, "--part", "heads", "--layers", "7", "--output", out)
    assert "layers must be some of the model's 0 to 2, got [7]" in line


def test_errors_have_three_digits():
    assert [error(x) for x in (None, 0, 0.12345, 12.345, 1234.5, 2e-5, 123456)] == [
        "", "0", "0.123", "12.3", "1234", "2.0e-05", "1.2e+05",
    ]  # fmt: skip
