"""``python -m studies.pointer``: its results."""

from studies.pointer.__main__ import app
from tests.studies import study


def test_the_study(tmp_path):
    content, lines = study.run(app, tmp_path / "out", "--quick")
    assert set(content["tables"]) == {"sorting", "hull", "tour", "times"}
    assert set(content["parts"]["tour, exact"]["scores"]) == {"5", "13"}
    assert lines[-1] == "times: 7 of 7"
