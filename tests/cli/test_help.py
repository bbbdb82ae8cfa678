"""The commands, their help, and arguments that do not parse."""

import re
from dataclasses import fields

import pytest

from performers.proteins.options import TrainingOptions, flag
from tests.cli.commands import refusal, run

COMMANDS = ["demo", "train", "evaluate", "embed", "generate", "report", "convert"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_help_lists_the_commands():
    out, _ = run("--help")
    assert all(re.search(rf"\b{command}\b", out) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    out, _ = run(command, "--help")
    assert "Usage:" in out
    assert "--help" in out


def test_every_training_option_is_a_flag():
    out, _ = run("train", "--help")
    assert [
        name for field in fields(TrainingOptions) if (name := flag(field.name)) not in out
    ] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_an_error(command):
    line = refusal(command, "--bogus")
    assert "--bogus" in line
    assert line.endswith(f" {command} --help")


def test_an_unknown_command_is_an_error():
    assert refusal("fly").startswith("No such command 'fly'; see ")
    assert "'brew'" in refusal("data", "brew")


@pytest.mark.parametrize("command", ["train", "evaluate", "embed", "report", "demo", "generate"])
def test_missing_arguments_are_named(command):
    assert refusal(command).startswith("Missing ")


@pytest.mark.parametrize("arguments", [[], ["data"], ["study"], ["benchmark"]], ids=str)
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
    line = refusal(*option, value)
    assert f"Invalid value for '{option[-1]}': {value} is not a 64-bit integer; see " in line


def test_so_is_one_of_a_list():
    line = refusal("benchmark", "attention", "--output", "x", "--lengths", f"128,{2**63}")
    assert line == f"--lengths: {2**63} is not a 64-bit integer"


@pytest.mark.parametrize("command", [["benchmark", "attention"], ["study", "proteins"]])
def test_threads_beyond_reason_are_refused(command):
    assert "'--threads'" in refusal(*command, "--output", "x", "--threads", 10**12)


def test_demo_checks_its_output_before_it_starts(tmp_path):
    (tmp_path / "x").touch()
    assert "is not empty" in refusal("demo", "--output", tmp_path)
    _, lines = run("demo", "--output", tmp_path / "new", "--steps", 0, code=2)
    assert "--steps" in "\n".join(lines)
    assert not (tmp_path / "new").exists()
