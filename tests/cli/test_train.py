"""``performers train``."""

import json
import os
import signal

import pytest

from performers.proteins.training import train as training
from tests.cli.commands import refusal, run
from tests.proteins.runs import flags, losses, proteins, write_sequences


@pytest.fixture
def output(tmp_path):
    return tmp_path / "model"


def test_flags_reach_the_options(fasta, output):
    """One of each type; all are made from the dataclass in the same way."""
    changes = {
        "objective": "clm",
        "attention": "favor-softmax",
        "num_layers": 1,
        "num_heads": 4,
        "num_features": 12,
        "positions": "learned",
        "packed": True,
        "across_sequences": True,
        "accumulation": 2,
        "learning_rate": 0.002,
        "bf16": True,
        "gradient_checkpointing": True,
        "validation_fraction": 0.2,
        "steps": 2,
        "eval_steps": 1,
        "estimator": "hyperbolic",
    }
    out, lines = run("train", fasta, "--output", output, *flags(**changes))
    options = json.loads((output / "training.json").read_text())["options"]
    changes["position_embedding"] = changes.pop("positions")
    assert {name: options[name] for name in changes} == changes
    assert options["max_length"] == 40
    assert options["redraw_steps"] == 2
    assert "validation" in out
    assert lines[-1].startswith("2 steps in ")
    assert lines[-1].endswith(f"model in {output}")


def test_a_validation_file_is_used_and_nothing_is_held_out(fasta, output, tmp_path):
    held = write_sequences(tmp_path / "held.fasta", proteins(4, seed=2))
    run("train", fasta, "--validation", held, "--output", output, *flags(steps=1))
    record = json.loads((output / "training.json").read_text())
    assert record["data"]["sequences"] == 30
    assert record["data"]["validation_sequences"] == 4
    assert record["result"]["eval_sequences"] == 4


@pytest.mark.parametrize(("fraction", "counts"), [(0.5, (20, 20)), (0, (40, 0))])
def test_several_files_are_one_data_set(fasta, output, tmp_path, fraction, counts):
    """Without validation there is no table."""
    more = write_sequences(tmp_path / "more.fasta", proteins(10, seed=2))
    arguments = ["train", fasta, more, "--output", output]
    out, _ = run(*arguments, *flags(steps=1, validation_fraction=fraction))
    data = json.loads((output / "training.json").read_text())["data"]
    assert (data["sequences"], data["validation_sequences"]) == counts
    assert bool(out) == bool(fraction)


def test_ctrl_c_exits_with_130_and_resume_continues(fasta, output, tmp_path, monkeypatch):
    arguments = ["--output", output, *flags(dropout=0.2)]
    original = training.train_model

    def interrupted(*given, progress, **options):
        def stop(step, total, log):
            progress(step, total, log)
            if step == 3 and not log:
                os.kill(os.getpid(), signal.SIGINT)

        return original(*given, progress=stop, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_model", interrupted)
        out, lines = run("train", fasta, *arguments, code=130)
    assert out == ""
    assert lines[-1].startswith("performers: stopped after step 4 of 6; ")
    assert "--resume" in lines[-1]
    before = sorted(path.name for path in output.iterdir())
    line = refusal("train", fasta, *arguments, "--resume", "--seed", 4, "--layers", 1)
    assert "--layers was 2, now 1; --seed was 0, now 4" in line
    other = write_sequences(tmp_path / "other.fasta", proteins(5, seed=7))
    assert "the data are not the same" in refusal("train", other, *arguments, "--resume")
    assert sorted(path.name for path in output.iterdir()) == before
    for _ in range(2):
        out, lines = run("train", fasta, *arguments, "--resume")
        assert "validation" in out, "a finished run still tells its scores"
        assert lines[-1].startswith("6 steps in ")
    assert len(losses(output)) == 6
