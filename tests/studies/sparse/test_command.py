"""``python -m studies.sparse``: its parts, and what it refuses."""

import pytest

from studies.sparse import attentions
from studies.sparse.__main__ import app
from tests.cli import commands
from tests.studies import study


@pytest.mark.slow
def test_the_study(tmp_path):
    content, _ = study.run(app, tmp_path / "out", "--quick", "--seeds", 1)
    tables = content["tables"]
    for name in ("times", "reach", "recall", "majority", "steps"):
        assert {row[0] for row in tables[name]["rows"]} >= set(attentions.ALL), name
    claims = {row[0]: row[1] for row in tables["verdicts"]["rows"]}
    assert len(claims) == 4
    assert claims["Sparse attention needs special kernels"] in ("holds", "refuted", "holds in part")
    assert (tmp_path / "out" / "steps.svg").read_text().startswith("<?xml")
    assert "pretrained" not in tables


def test_models_need_texts(tmp_path):
    line = commands.refusal("--output", tmp_path / "out", "--encoder", tmp_path, app=app)
    assert "--calibration and --text" in line
