"""What only a process shows: exit codes, signals, several processes, what is printed unasked."""

import json

import pytest

from tests.cli.commands import run
from tests.proteins.runs import finish, flags, launcher, losses, same_weights, start


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    missing = tmp_path / "none.fasta"
    command = ["data", "uniref50", missing, "--output", tmp_path / "model"]
    code, out, err = finish(start("-m", "performers", *command))
    assert (code, out) == (2, "")
    assert err == f"performers: {missing} does not exist\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("typer", ["--help"], "proteins"),
        ("transformers", ["train", "x.fasta", "--output", "OUT"], "proteins"),
        ("transformers", ["convert", __file__, "--data", __file__, "--output", "OUT"], "convert"),
        ("Bio", ["report", __file__, __file__, "--output", "OUT"], "proteins"),
        ("rich", ["benchmark", "attention", "--help"], "benchmark"),
        ("matplotlib", ["benchmark", "decode", "--output", "OUT"], "benchmark"),
    ],
    ids=str,
)
def test_without_its_packages_the_command_says_what_to_install(missing, arguments, extra, tmp_path):
    out = str(tmp_path / "out")
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from performers.cli import main\n"
        f"sys.argv = ['performers', *{[out if x == 'OUT' else x for x in arguments]}]\n"
        "main()\n"
    )
    code, out, err = finish(start("-c", script))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("performers: ")
    assert missing in last
    assert f"pip install 'performers[{extra}]'" in last


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

    command = ["train", fasta, "--output", two, *options]
    code, _, err = finish(start(*launcher(2), script, *command))
    assert code != 0
    assert err.count("performers: stopped after step 4 of 6; ") == 2, err
    assert "(exitcode: 130)" in err
    assert not (two / "config.json").exists()

    code, out, err = finish(start(*launcher(2), "-m", "performers", *command, "--resume"))
    assert code == 0, err
    assert "Warning" not in err
    assert out.count("validation") == 1, "one process prints"
    assert err.count("model in") == 1
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert same_weights(two, one)
    assert json.loads((two / "training.json").read_text())["processes"] == 2
    assert not [path for path in two.iterdir() if path.name.startswith(".")]
