"""Studies of parts: kept as JSON, resumed with the same settings alone."""

import json

import pytest

from performers.app.errors import UserError
from studies.pages import Table
from studies.parts import run_parts


def tables(parts):
    return {"sums": Table(("part", "sum"), [(x, str(sum(parts[x]["by"].values()))) for x in parts])}


def test_parts_are_kept_and_are_the_same_when_they_are_read_again(tmp_path):
    measured = []

    def measure(name):
        measured.append(name)
        return {"by": {1: 2, 3: 4}, "pair": (5, 6)}

    parts = {name: lambda name=name: measure(name) for name in ("a", "b")}
    settings = {"sizes": (1, 2), "seed": 0}
    first = run_parts(tmp_path, settings, {"a": parts["a"]}, tables, resume=False)
    assert first == {"a": {"by": {"1": 2, "3": 4}, "pair": [5, 6]}}
    done = run_parts(tmp_path, settings, parts, tables, resume=True)
    assert measured == ["a", "b"]
    assert done["a"] == done["b"] == first["a"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["parts"] == done
    assert content["tables"]["sums"]["rows"] == [["a", "6"], ["b", "6"]]
    with pytest.raises(UserError, match=r"\(seed was 0, now 1; rows was None, now 3\)"):
        run_parts(tmp_path, {**settings, "seed": 1, "rows": 3}, parts, tables, resume=True)


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds no parts of a study"):
        run_parts(tmp_path, {}, {}, tables, resume=True)
