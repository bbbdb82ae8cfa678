"""What only a process shows: exit codes, signals, several processes, what is printed unasked."""

import json
import os
import signal
import time

import pytest

from tests.cli.commands import run
from tests.proteins.runs import (
    finish,
    flags,
    losses,
    same_weights,
    start,
)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    missing = tmp_path / "none.fasta"
    process = start("-m", "performers", "train", missing, "--output", tmp_path / "model")
    code, out, err = finish(process)
    assert (code, out) == (2, "")
    assert err == f"performers: {missing}: no such file; check the path\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_ctrl_c_from_outside_leaves_a_run_that_resumes(tmp_path, fasta):
    arguments = [fasta, *flags(steps=80, save_steps=5, redraw_steps=7, dropout=0.2)]
    output = tmp_path / "model"
    process = start("-m", "performers", "train", *arguments, "--output", output)
    deadline = time.monotonic() + 90
    while not list(output.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert "Warning" not in err
    lines = err.splitlines()
    assert all(line.startswith("training: ") for line in lines[:-1])
    assert lines[-1].startswith("performers: stopped after step ")
    assert "run the same command with --resume to continue" in lines[-1]
    assert not (output / "config.json").exists()

    run("train", *arguments, "--output", output, "--resume")
    run("train", *arguments, "--output", tmp_path / "whole")
    assert len(losses(output)) == 80
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert same_weights(output, tmp_path / "whole")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("typer", ["--help"]), ("transformers", ["train", "x.fasta", "--output", "x"])],
    ids=["typer", "transformers"],
)
def test_without_its_packages_the_command_says_what_to_install(missing, arguments):
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from performers.cli import main\n"
        f"sys.argv = ['performers', *{arguments}]\n"
        "main()\n"
    )
    code, out, err = finish(start("-c", script))
    assert (code, out) == (2, "")
    assert err.startswith("performers: ")
    assert missing in err
    assert "pip install 'performers[" in err
    assert err.count("\n") == 1


_STOPPED = """
import os, signal
from performers.cli import main
from performers.proteins.training import train as training

train_model = training.train_model

def stopped(*given, progress, **options):
    def stop(step, total, log):
        # Only the first process is told of progress, so only it is signalled.
        if step == 3 and not log:
            os.kill(os.getpid(), signal.SIGTERM)
    return train_model(*given, progress=stop, **options)

training.train_model = stopped
main()
"""


@pytest.mark.exhaustive
def test_two_processes_train_one_model_and_stop_and_resume_together(tmp_path, fasta):
    """Two processes take the batches that one takes in two accumulated halves of a step."""
    script, one, two = tmp_path / "stopped.py", tmp_path / "one", tmp_path / "two"
    script.write_text(_STOPPED)
    options = flags(dropout=0.0, save_steps=5)
    run("train", fasta, "--output", one, *options, "--accumulation", 2)

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command = ["train", fasta, "--output", two, *options]
    code, _, err = finish(start(*launcher, script, *command))
    assert code != 0
    assert err.count("performers: stopped after step 4 of 6; ") == 2, err
    assert "(exitcode: 130)" in err
    assert not (two / "config.json").exists()

    code, out, err = finish(start(*launcher, "-m", "performers", *command, "--resume"))
    assert code == 0, err
    assert "Warning" not in err
    assert out.count("validation") == 1, "one process prints"
    assert err.count("model in") == 1
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert same_weights(two, one)
    assert json.loads((two / "training.json").read_text())["processes"] == 2
    assert not [path for path in two.iterdir() if path.name.startswith(".")]
