"""What the README and the documents say can be run, and what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_python_examples_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    shapes = []
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
        shapes.append(names["out"].shape)
    assert shapes == [(2, 1000, 512), (2, 8, 4096, 64), (1, 205)]
    assert "Recommended" in capsys.readouterr().out
    assert (tmp_path / "linear-model" / "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.split("#")[0]).exists(), link


def test_ci_and_readme_share_the_test_command():
    """CI runs what the README tells: one install line, one pytest line."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    install = "-c constraints.txt torch '.[test]'"
    assert install in readme
    assert install in ci
    assert "python -m pytest -q" in readme
    assert 'python" -m pytest -q' in ci
