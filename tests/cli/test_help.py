"""The commands, their help, and arguments that do not parse."""

import importlib.metadata
import re

import pytest

import performers
from performers import features
from performers.app import conversion
from performers.app import options as app_options
from performers.convert.distillation import trainers
from performers.models import registry
from performers.training import options
from tests.cli.commands import refusal, run
from tests.proteins.runs import finish, start

COMMANDS = [
    *("train", "evaluate", "embed", "score", "generate", "report", "demo", "probe", "convert"),
    *(f"data {name}" for name in ("swissprot", "uniref50", "trembl", "merge", "export")),
    *("benchmark attention", "benchmark model", "benchmark decode"),
]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_help_lists_the_commands():
    for group in ("", "data", "benchmark"):
        out, _ = run(*group.split(), "--help")
        # A group alone shows the same.
        alone, lines = run(*group.split(), code=2)
        assert "Usage:" in alone + "\n".join(lines)
        for command in COMMANDS:
            name, _, subcommand = command.partition(" ")
            if not group or name == group:
                assert re.search(rf"\b{subcommand if group else name}\b", out)


def test_the_version():
    out, lines = run("--version")
    assert (out, lines) == (f"performers {performers.__version__}\n", [])
    installed = [x.version for x in importlib.metadata.distributions(name="performers")]
    assert performers.__version__ == (installed or ["0+unknown"])[0]
    assert "--version" in run("--help")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_refuses_an_unknown_option(command):
    out, _ = run(*command.split(), "--help")
    assert "Usage:" in out
    assert "--output" in out or command == "evaluate"
    assert f"Example: performers {command} " in out
    line = refusal(*command.split(), "--bogus")
    assert "--bogus" in line
    assert line.endswith(f" {command} --help")
    assert refusal(*command.split()).startswith("Missing ")


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from tests.cli.commands import run\n"
        f"for command in {['', *COMMANDS]}: run(*command.split(), '--help')\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'matplotlib', 'Bio', 'pyarrow'}\n"
        "print(heavy & {*sys.modules})"
    )
    assert finish(start("-W", "error", "-c", code)) == (0, "set()\n", "")


def test_options_of_training_are_grouped():
    out, _ = run("train", "--help")
    headings = re.findall(r"─ ([A-Z][a-z ]+) ─", out)
    assert headings == [
        *("Arguments", "Options", "Model", "Batches", "Optimisation", "Device and memory"),
        "Validation and logs",
    ]


def test_a_typo_is_answered_and_completion_works_without_torch():
    assert "Did you mean 'train'" in refusal("trian")
    code = (
        "import sys; sys.argv = ['performers']\n"
        "try:\n"
        "    from performers.cli import main; main()\n"
        "finally:\n"
        "    print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    )
    completing = {
        "_PERFORMERS_COMPLETE": "complete_bash",
        "COMP_WORDS": "performers tr",
        "COMP_CWORD": "1",
    }
    _, out, error = finish(start("-c", code, **completing))
    assert out.splitlines() == ["train", "set()"], error


def test_names_that_help_spells_are_those_of_the_packages():
    # Studies register more.
    assert tuple(registry.ATTENTIONS)[: len(options.ATTENTIONS)] == options.ATTENTIONS
    assert app_options.ESTIMATORS == features.ESTIMATORS
    assert app_options.PROJECTIONS == features.PROJECTIONS
    assert conversion.LOSSES == trainers.LOSSES
    assert set(options.ESTIMATORS) == {*features.ESTIMATORS} - {*features.CALIBRATED}
