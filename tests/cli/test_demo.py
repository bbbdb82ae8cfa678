"""``performers demo`` on a little data, and once on its own."""

import json

import pytest

from performers.proteins import demo
from tests.cli.commands import run
from tests.proteins.runs import proteins, write_sequences

MODELS = {"performer-softmax", "performer-relu", "transformer"}
SCORES = {"accuracy", "perplexity", "loss", "tokens", "baseline_accuracy", "baseline_perplexity"}


def assert_complete(output, steps):
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics.keys() == MODELS
    for name, model in metrics.items():
        for split in ("test", "ood"):
            assert model[split].keys() >= SCORES
            assert 0 <= model[split]["accuracy"] <= 1
        assert model["steps"] == steps
        assert model["train_seconds"] > 0
        assert (output / "models" / name / "model.safetensors").exists()
    sizes = {model["parameters"] for model in metrics.values()}
    assert len(sizes) == 1
    page = (output / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in MODELS)
    return metrics


@pytest.fixture
def little_data(tmp_path, monkeypatch):
    def embedded(split):
        seed = ["train", "validation", "test", "ood"].index(split)
        return write_sequences(tmp_path / f"{split}.fasta", proteins(12, seed=seed))

    monkeypatch.setattr(demo, "embedded_fasta", embedded)


def test_the_demo_writes_metrics_report_and_models_and_resumes(little_data, tmp_path, monkeypatch):
    output = tmp_path / "demo"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # Interrupted after its first model was trained.
        patched.setattr(demo, "describe_model", interrupt)
        run("demo", "--output", output, "--steps", 2, code=130)
    first = output / "models" / "performer-softmax" / "config.json"
    written = first.stat().st_mtime_ns
    out, _ = run("demo", "--output", output, "--steps", 2, "--resume")
    assert first.stat().st_mtime_ns == written, "what was finished is kept"
    assert_complete(output, 2)
    assert "performer-relu, ood" in out
    assert f"report: {output / 'report.html'}" in out


@pytest.mark.slow
def test_the_demo_on_its_own_data(tmp_path):
    run("demo", "--output", tmp_path / "demo", "--steps", 2)
    metrics = assert_complete(tmp_path / "demo", 2)
    assert metrics["transformer"]["test"]["tokens"] > 10_000
