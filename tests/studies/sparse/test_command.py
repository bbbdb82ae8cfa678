"""``python -m studies.sparse``: its parts, resuming, and what it refuses."""

import json

import pytest

from studies.sparse import attentions, pretrained
from studies.sparse.__main__ import app
from tests.cli import commands


@pytest.mark.slow
def test_the_study(tmp_path):
    arguments = ["--output", tmp_path / "out", "--quick", "--seeds", 1]
    commands.run(*arguments, app=app)
    file = tmp_path / "out" / "results.json"
    content = json.loads(file.read_text())
    tables = content["tables"]
    for name in ("times", "reach", "recall", "majority", "steps"):
        assert {row[0] for row in tables[name]["rows"]} >= set(attentions.ALL), name
    claims = {row[0]: row[1] for row in tables["verdicts"]["rows"]}
    assert len(claims) == 4
    assert claims["Sparse attention needs special kernels"] in ("holds", "refuted", "holds in part")
    assert (tmp_path / "out" / "steps.svg").read_text().startswith("<?xml")
    assert "pretrained" not in tables
    kept = content["parts"]
    commands.run(*arguments, "--resume", app=app)
    assert json.loads(file.read_text())["parts"] == kept
    # Parts can be added, and sizes not changed.
    line = commands.refusal("--output", tmp_path / "out", "--resume", app=app)
    assert "give another folder" in line


def test_models_need_texts(tmp_path):
    line = commands.refusal("--output", tmp_path / "out", "--encoder", tmp_path, app=app)
    assert "--calibration and --text" in line


def test_weights_are_kept_for_what_needs_no_shared_queries():
    assert not set(attentions.BY_CONTENT) & set(pretrained.ALL)
