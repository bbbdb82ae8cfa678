"""``python -m studies.pointer``: its results, and resuming."""

import json

from studies.pages import Table
from studies.pointer.__main__ import app
from tests.cli import commands


def test_the_study(tmp_path):
    arguments = ["--output", tmp_path / "out", "--quick"]
    commands.run(*arguments, app=app)
    file = tmp_path / "out" / "results.json"
    content = json.loads(file.read_text())
    assert set(content["tables"]) == {"sorting", "hull", "tour", "times"}
    assert all(Table(**table).markdown() for table in content["tables"].values())
    assert set(content["parts"]["tour, exact"]["scores"]) == {"5", "13"}
    # Parts that are missing are measured, the others kept.
    content["parts"]["sorting, exact"]["loss"] = 7.0
    del content["parts"]["times"]
    file.write_text(json.dumps(content))
    assert "--resume" in commands.refusal(*arguments, app=app)
    _, lines = commands.run(*arguments, "--resume", app=app)
    assert "sorting, exact: 2 of 7, kept" in lines
    content = json.loads(file.read_text())
    assert content["parts"]["sorting, exact"]["loss"] == 7.0
    assert "times" in content["parts"]
    line = commands.refusal(*arguments, "--resume", "--seed", 1, app=app)
    assert "give another folder" in line
