"""Studies of parts: kept as JSON, resumed with the same settings and data alone."""

import json
from dataclasses import dataclass, replace

import pytest

from performers.app.errors import UserError
from performers.app.options import option
from studies.pages import Table
from studies.parts import StudyOptions, by_seed, fingerprint, run_parts, section


@dataclass(frozen=True, kw_only=True)
class Sums(StudyOptions):
    sizes: tuple[int, ...] = option("Sizes.", (1, 2))
    seed: int = option("Seed.", 0)


def tables(parts):
    return {"sums": Table(("part", "sum"), [(x, str(sum(parts[x]["by"].values()))) for x in parts])}


def test_parts_are_kept_and_are_the_same_when_they_are_read_again(tmp_path):
    measured = []

    def measure(name):
        measured.append(name)
        return {"by": {1: 2, 3: 4}, "pair": (5, 6)}

    parts = {name: lambda name=name: measure(name) for name in ("a", "b")}
    options = Sums(output_folder=tmp_path)
    first = run_parts(options, {"a": parts["a"]}, tables)
    assert first == {"a": {"by": {"1": 2, "3": 4}, "pair": [5, 6]}}
    options = replace(options, resume=True)
    done = run_parts(options, parts, tables)
    assert measured == ["a", "b"]
    assert done["a"] == done["b"] == first["a"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"] == {"sizes": [1, 2], "seed": 0}
    assert content["parts"] == done
    assert content["tables"]["sums"]["rows"] == [["a", "6"], ["b", "6"]]
    with pytest.raises(UserError, match=r"\(seed was 0, now 1\)"):
        run_parts(replace(options, seed=1), parts, tables)
    with pytest.raises(UserError, match=r"\(rows was None, now 3\)"):
        run_parts(options, parts, tables, settings={**options.settings(), "rows": 3})


def test_data_are_compared_where_a_section_has_parts(tmp_path):
    options = StudyOptions(output_folder=tmp_path, resume=True)
    parts = {f"{name}, seed 0": lambda: {"by": {}} for name in ("trees", "stars")}
    trees = {"trees, seed 0": parts["trees, seed 0"]}
    run_parts(options, trees, tables, data={"trees": "one"})
    run_parts(options, parts, tables, data={"stars": "two"})
    assert json.loads((tmp_path / "results.json").read_text())["data"] == {
        "trees": "one",
        "stars": "two",
    }
    run_parts(options, parts, tables, data={"trees": "one", "stars": "two"})
    with pytest.raises(UserError, match=r"\(data of trees was one, now two\)"):
        run_parts(options, parts, tables, data={"trees": "two", "stars": "two"})


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds no parts of a study"):
        run_parts(StudyOptions(output_folder=tmp_path, resume=True), {}, tables)


def test_fingerprints_are_those_of_content_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    found = [fingerprint(tmp_path / "a"), fingerprint(tmp_path / "a" / "x")]
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    found += [fingerprint(tmp_path / "a"), fingerprint(tmp_path / "a" / "y")]
    assert found[1] == found[3]
    assert len(set(found)) == 3


def test_parts_by_name():
    parts = {f"trees, {x}, seed {n}": {"x": x, "n": n} for n in (0, 1) for x in "ab"}
    assert list(section({**parts, "stars, c, seed 0": {}}, "trees")) == [
        "a, seed 0", "b, seed 0", "a, seed 1", "b, seed 1",
    ]  # fmt: skip
    assert {x: [y["n"] for y in z] for x, z in by_seed(parts).items()} == {
        "trees, a": [0, 1],
        "trees, b": [0, 1],
    }
