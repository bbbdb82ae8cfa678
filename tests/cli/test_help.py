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
    _, lines = run(command, "--bogus", code=2)
    assert "--bogus" in "\n".join(lines)


def test_an_unknown_command_is_an_error():
    _, lines = run("fly", code=2)
    assert "fly" in "\n".join(lines)


@pytest.mark.parametrize("command", ["train", "evaluate", "embed", "report", "demo", "generate"])
def test_missing_arguments_are_named(command):
    _, lines = run(command, code=2)
    assert "Missing" in "\n".join(lines)


def test_demo_checks_its_output_before_it_starts(tmp_path):
    (tmp_path / "x").touch()
    assert "is not empty" in refusal("demo", "--output", tmp_path)
    _, lines = run("demo", "--output", tmp_path / "new", "--steps", 0, code=2)
    assert "--steps" in "\n".join(lines)
    assert not (tmp_path / "new").exists()
