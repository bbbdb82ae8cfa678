"""Pages of results are written from the results of studies."""

import re

import pytest

from studies.pages import PAGES, RESULTS, STUDIES, Table, digits, pivot, render


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_those_of_the_results(page):
    source = (STUDIES / PAGES[page] / "page.md").read_text()
    assert not re.search(r"^\|", source, re.MULTILINE), "no table is in the text"
    text = render(STUDIES / PAGES[page])
    assert (RESULTS / page).read_text(encoding="utf-8") == text, "run python -m studies.pages"
    assert "{{" not in text


def test_a_table_in_markdown():
    table = Table(("a", "b"), [("x", "1")])
    assert table.markdown() == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_rows_that_lack_a_cell():
    table = Table.of([{"a": "x"}, {"a": "y", "b": "1"}])
    assert table == (["a", "b"], [("x", "–"), ("y", "1")], 1)


def test_a_pivot():
    rows = [
        {"a": "x", "n": 1024, "y": 1},
        {"a": "x", "n": 2048, "y": 2},
        {"a": "z", "n": 2048, "y": 3},
    ]
    table = pivot(rows, ("a",), "n", lambda row: str(row["y"]))
    assert table == (["a", "1,024", "2,048"], [("x", "1", "2"), ("z", "–", "3")], 1)
    assert Table(("a", "b"), [("x", ""), ("y", "–")]).filled() == (["a"], [["x"], ["y"]], 1)


def test_numbers_have_three_digits():
    assert [digits(x) for x in (None, 0, 0.12345, 12.345, 1234.5, 2e-5, 123456)] == [
        "–", "0", "0.123", "12.3", "1234", "2.0e-05", "1.2e+05",
    ]  # fmt: skip


def test_every_study_says_what_it_asks():
    folders = {path.parent for path in (*STUDIES.glob("*/*.py"), *STUDIES.glob("*/page.md"))}
    assert {folder.name for folder in folders if not (folder / "README.md").exists()} == set()
