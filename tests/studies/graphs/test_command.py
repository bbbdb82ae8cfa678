"""``python -m studies.graphs``: its results on made-up data, and refusals."""

import pytest

pytest.importorskip("torch_geometric")

from studies.graphs import scaling
from studies.graphs.__main__ import app
from studies.graphs.debian import app as debian
from studies.graphs.debian import load_packages, save_packages
from tests.cli import commands
from tests.studies import study
from tests.studies.graphs.conftest import index_of_packages


@pytest.fixture
def data(molsets, tmp_path):
    index = tmp_path / "Packages"
    index.write_text(index_of_packages(60))
    _, lines = commands.run(molsets.parent / "debian.npz", "--packages", index, app=debian)
    assert "60 packages, 78 edges, 2 sections, 60 sources" in lines[-1]
    return molsets.parent


def test_the_study(data, tmp_path, monkeypatch):
    pytest.importorskip("rdkit", reason="rdkit makes the molecules")
    monkeypatch.setattr(scaling, "run_apart", lambda call, threads: call())
    content, lines = study.run(app, tmp_path / "out", "--quick", "--data", data)
    assert lines[-1] == "scaling, 64 nodes: 11 of 11"
    tables = content["tables"]
    assert set(tables) == {"molecules", "batches", "debian", "scaling", "verdicts"}
    # A line for each attention but one, each attention's batches, each model of packages but one,
    # each attention but the exact one.
    assert len(tables["verdicts"]["rows"]) == 5 + 8 + 3 + 3
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 1000


def test_results_of_other_data_are_refused(data, tmp_path):
    arguments = ["--output", tmp_path / "out", "--quick", "--sections", "debian", "--data", data]
    commands.run(*arguments, app=app)
    packages = load_packages(data / "debian.npz")
    save_packages(packages._replace(edges=packages.edges[:, 1:]), data / "debian.npz")
    line = commands.refusal(*arguments, "--resume", app=app)
    assert "measured with other settings (data of debian was " in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--data is needed for the section molecules"),
        (["--sections", "debian"], "--data is needed for the section debian"),
        (["--sections", "trees"], "--sections must be one of molecules"),
        (["--sections", "debian", "--data", "absent"], "is not a graph of packages"),
    ],
)
def test_what_is_missing_is_named(arguments, words, tmp_path):
    assert words in commands.refusal(*arguments, "--output", tmp_path / "out", app=app)


def test_a_folder_without_molecules_is_refused(tmp_path):
    pytest.importorskip("rdkit", reason="rdkit makes the molecules")
    arguments = ["--sections", "molecules", "--data", tmp_path, "--output", tmp_path / "out"]
    assert "pip download --no-deps molsets" in commands.refusal(*arguments, app=app)
