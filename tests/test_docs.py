"""The examples of the README and of the documentation run, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from performers.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


# Models with random weights have the dropout of training.
@pytest.mark.filterwarnings("ignore:the dropout of attention weights")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_the_python_examples_run(page, monkeypatch, tmp_path):
    """All blocks of a page, one after the other, with the names of those before."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)
    assert names["out"].isfinite().all()


def commands(page):
    """The commands of a page that call the program, and the lines they stand on."""
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    lines = text.splitlines()
    calls = [call.strip() for line in lines for call in line.split("&&")]
    return [call for call in calls if call.startswith(("performers ", ".venv/bin/performers "))]


@pytest.mark.parametrize(
    "call", sorted({call for page in PAGES for call in commands(page)}), ids=lambda call: call[:60]
)
def test_the_options_of_commands_exist(call):
    """Every command parses, with required options and without unknown ones."""
    words = shlex.split(re.sub(r"\[.*?\]|\.\.\.", "", call))[1:]
    group = get_command(app)
    with group.make_context("performers", words[:], resilient_parsing=True):
        pass
    command = group
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    with command.make_context(command.name, words):
        pass


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not link.startswith(("http://", "https://", "#")):
                assert (page.parent / link.split("#")[0]).exists(), (page.name, link)


def test_ci_and_readme_share_the_test_command():
    """CI runs what the README tells: one install line, one pytest line."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    install = "-c constraints.txt torch '.[test]'"
    assert install in readme
    assert install in ci
    assert "python -m pytest -q" in readme
    assert 'python" -m pytest -q' in ci
