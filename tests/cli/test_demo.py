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


def test_the_demo_writes_metrics_and_report_and_resumes(little_data, tmp_path, monkeypatch):
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
    monkeypatch.setattr(demo, "MODELS", {"transformer": "exact"})
    (output / "models" / "transformer" / "config.json").unlink()
    _, lines = run("demo", "--output", output, "--steps", 3, "--resume", code=2)
    assert "--steps was 2, now 3" in lines[-1]


def test_a_process_that_fails_is_told_and_ends_the_others(little_data, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "transformer").write_text("not a folder")
    with pytest.raises(RuntimeError, match=r"(?s)transformer failed:.*File exists"):
        demo.run_demo(tmp_path, steps=10**6)


def test_ctrl_c_ends_the_processes_with_their_checkpoints(little_data, tmp_path, monkeypatch):
    models = dict([*demo.MODELS.items()][1:])
    begun, mine, run_demo = set(), [], demo.run_demo

    def interrupted(*given, report, **options):
        def stop(what, done, total, entry):
            report(what, done, total, entry)
            begun.update([what] if what.startswith("training") and done else [])
            if len(begun) == len(models) and not mine:
                children = psutil.Process().children(recursive=True)
                # The server that starts them is this process's own child, and stays.
                mine.extend(x for x in children if x.ppid() != os.getpid())
                os.kill(os.getpid(), signal.SIGINT)

        return run_demo(*given, report=stop, **options)

    monkeypatch.setattr(demo, "MODELS", models)
    monkeypatch.setattr(demo, "run_demo", interrupted)
    arguments = ["demo", "--output", tmp_path / "demo", "--steps", 10**6]
    _, lines = run(*arguments, code=130)
    assert "--resume goes on from there" in lines[-1]
    assert len(list(tmp_path.glob("demo/models/*/checkpoints/checkpoint-*"))) >= len(models)
    assert len(mine) >= len(models)
    assert not any(map(_runs, mine))


def test_a_demo_that_is_killed_leaves_no_process(tmp_path):
    # Without the imports before it, the process of a model is there at once.
    code = (
        "from performers.cli import main\nfrom performers.proteins import demo\n"
        "demo.MODELS, demo._HEAVY = {'transformer': 'exact'}, ()\nmain()"
    )
    process = start("-c", code, "demo", "--output", tmp_path / "demo")
    end, mine = time.monotonic() + 60, []
    while all(x.ppid() == process.pid for x in mine) and time.monotonic() < end:
        time.sleep(0.1)
        mine = psutil.Process(process.pid).children(recursive=True)
    assert len(mine) >= 2
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
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
