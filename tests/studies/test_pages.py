"""Pages of results are written from the results of studies."""

import re

import pytest

from studies.pages import PAGES, RESULTS, STUDIES, Table, render


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_those_of_the_results(page):
    text = render(STUDIES / PAGES[page])
    assert (RESULTS / page).read_text(encoding="utf-8") == text, "run python -m studies.pages"
    assert "{{" not in text


@pytest.mark.parametrize("page", PAGES)
def test_no_table_is_in_the_text(page):
    assert not re.search(r"^\|", (STUDIES / PAGES[page] / "page.md").read_text(), re.MULTILINE)


def test_a_table_in_markdown():
    table = Table(("a", "b"), [("x", "1")])
    assert table.markdown() == "| a | b |\n| --- | ---: |\n| x | 1 |"


@pytest.mark.parametrize("folder", [path for path in STUDIES.iterdir() if path.is_dir()], ids=str)
def test_every_study_says_what_it_asks(folder):
    if any(folder.glob("*.py")) or (folder / "page.md").exists():
        assert (folder / "README.md").exists()
