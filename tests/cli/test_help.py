"""The commands, their help, and arguments that do not parse."""

import re
from dataclasses import fields

import pytest

from performers import features
from performers.app import options as app_options
from performers.models import registry
from performers.proteins import options
from performers.proteins.options import TrainingOptions
from tests.cli.commands import refusal, run
from tests.proteins.runs import finish, start

COMMANDS = [
    *("train", "evaluate", "embed", "generate", "report", "demo", "probe", "convert"),
    *("data swissprot", "data go-labels"),
    *("benchmark attention", "benchmark model", "benchmark decode"),
]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_help_lists_the_commands():
    for group in ("", "data", "benchmark"):
        out, _ = run(*group.split(), "--help")
        for command in COMMANDS:
            name, _, subcommand = command.partition(" ")
            if not group or name == group:
                assert re.search(rf"\b{subcommand if group else name}\b", out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_refuses_an_unknown_option(command):
    out, _ = run(*command.split(), "--help")
    assert "Usage:" in out
    assert "--output" in out or command == "evaluate"
    line = refusal(*command.split(), "--bogus")
    assert "--bogus" in line
    assert line.endswith(f" {command} --help")
    assert refusal(*command.split()).startswith("Missing ")


def test_every_training_option_is_a_flag():
    out, _ = run("train", "--help")
    assert [
        item.name
        for item in fields(TrainingOptions)
        if "option" in item.metadata and TrainingOptions.flag(item.name) not in out
    ] == []


def test_an_unknown_command_is_an_error():
    assert refusal("fly").startswith("No such command 'fly'; see ")
    assert "'brew'" in refusal("data", "brew")


@pytest.mark.parametrize("arguments", [[], ["data"], ["benchmark"]], ids=str)
def test_a_group_alone_shows_its_help(arguments):
    out, lines = run(*arguments, code=2)
    assert "Usage:" in out + "\n".join(lines)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize(
    "option",
    [
        ["train", "a.fasta", "--output", "x", "--num-features"],
        ["train", "a.fasta", "--output", "x", "--eval-steps"],
        ["generate", "x", "--top-k"],
        ["probe", "a.fasta", "--output", "x", "--repeats"],
        ["data", "swissprot", "--output", "x", "--shard-tokens"],
        ["benchmark", "decode", "--output", "x", "--head-dim"],
        ["convert", "x", "--data", "x", "--output", "x", "--lora-rank"],
    ],
    ids=lambda option: f"{option[0]} {option[-1]}",
)
def test_an_integer_beyond_64_bits_is_refused(option, value):
    assert refusal(*option, value) == f"{option[-1]} must be a 64-bit integer, got {value}"


def test_so_is_one_of_a_list():
    line = refusal("benchmark", "attention", "--output", "x", "--lengths", f"128,{2**63}")
    assert line == f"--lengths must be a 64-bit integer, got {2**63}"


def test_threads_beyond_reason_are_refused():
    line = refusal("benchmark", "attention", "--output", "x", "--threads", 10**12)
    assert line == f"--threads must be at least 1 and at most 1024, got {10**12}"


def test_demo_checks_its_output_before_it_starts(tmp_path):
    (tmp_path / "x").touch()
    assert "is not empty" in refusal("demo", "--output", tmp_path)
    assert "--steps" in refusal("demo", "--output", tmp_path / "new", "--steps", 0)
    assert not (tmp_path / "new").exists()


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from tests.cli.commands import run\n"
        f"for command in {['', *COMMANDS]}: run(*command.split(), '--help')\n"
        "print({'torch', 'transformers', 'numpy', 'matplotlib', 'Bio'} & {*sys.modules})"
    )
    assert finish(start("-W", "error", "-c", code)) == (0, "set()\n", "")


def test_names_that_help_spells_are_those_of_the_packages():
    # Studies register more.
    assert tuple(registry.ATTENTIONS)[: len(options.ATTENTIONS)] == options.ATTENTIONS
    assert app_options.ESTIMATORS == features.ESTIMATORS
    assert app_options.PROJECTIONS == features.PROJECTIONS
    assert set(options.ESTIMATORS) == {*features.ESTIMATORS} - {*features.CALIBRATED}
