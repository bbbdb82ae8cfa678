"""``performers demo`` on a little data, and once on its own."""

import json
import os
import shutil
import signal
import time

import psutil
import pytest

from performers.proteins import demo
from tests.cli.commands import run
from tests.proteins.runs import finish, proteins, start, write_sequences

MODELS = {"performer-softmax", "performer-relu", "transformer"}
SCORES = {"accuracy", "perplexity", "loss", "tokens", "baseline_accuracy", "baseline_perplexity"}


def assert_complete(output, steps):
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics.pop("provenance")["schema"] == "performers/demo/1"
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


def test_the_demo_writes_metrics_and_report_and_resumes(little_data, tmp_path):
    output = tmp_path / "demo"
    _, lines = run("demo", "--output", output, "--steps", 2)
    assert_complete(output, 2)
    assert any(line.startswith("demo, percent: 100 of 100") for line in lines)
    kept = output / "models" / "performer-softmax" / "config.json"
    written = kept.stat().st_mtime_ns
    shutil.rmtree(output / "models" / "transformer")
    out, _ = run("demo", "--output", output, "--steps", 2, "--resume")
    assert kept.stat().st_mtime_ns == written, "what was finished is kept"
    assert_complete(output, 2)
    assert "performer-relu, ood" in out
    assert f"report: {output / 'report.html'}" in out
    # What a process refuses, the demo refuses.
    (output / "models" / "transformer" / "config.json").unlink()
    _, lines = run("demo", "--output", output, "--steps", 3, "--resume", code=2)
    assert "--steps was 2, now 3" in lines[-1]


def test_a_process_that_fails_is_told_and_ends_the_others(little_data, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "transformer").write_text("not a folder")
    with pytest.raises(RuntimeError, match=r"(?s)transformer failed:.*File exists"):
        demo.run_demo(tmp_path, steps=10**6)


@pytest.mark.parametrize(("number", "models"), [(signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_a_demo_that_is_stopped_leaves_no_process(tmp_path, number, models):
    code = (
        "from performers.cli import main\nfrom performers.proteins import demo\n"
        f"demo.MODELS = dict([*demo.MODELS.items()][-{models}:])\nmain()"
    )
    process = start("-c", code, "demo", "--output", tmp_path / "demo")
    for line in process.stderr:
        if "training transformer" in line:
            break
    mine = psutil.Process(process.pid).children(recursive=True)
    assert len(mine) >= models
    os.kill(process.pid, number)
    code, _, err = finish(process)
    if number == signal.SIGINT:
        assert code == 130
        assert "--resume goes on from there" in err
        assert len(list(tmp_path.glob("demo/models/*/checkpoints/checkpoint-*"))) >= models
    end = time.monotonic() + 30
    while any(map(_runs, mine)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_runs, mine))


def _runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_the_demo_on_its_own_data(tmp_path):
    run("demo", "--output", tmp_path / "demo", "--steps", 2)
    metrics = assert_complete(tmp_path / "demo", 2)
    assert metrics["transformer"]["test"]["tokens"] > 10_000
