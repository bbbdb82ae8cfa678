"""``python -m studies.catalogue``: its results on made-up data, and refusals."""

import pytest

from studies.catalogue import million
from studies.catalogue.__main__ import app
from tests.benchmark.tiny_models import words
from tests.cli import commands
from tests.studies import study


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Options of a tiny package index, ratings and texts."""
    monkeypatch.setattr(million, "run_apart", lambda call, threads: call())
    index, ratings, texts = (tmp_path / name for name in ("Packages", "ml-100k.inter", "texts"))
    packages = (
        f"Package: p{i}\nDepends: {', '.join(f'p{i * j % 120} (>= 1)' for j in range(2, 8))}"
        for i in range(120)
    )
    index.write_text("\n\n".join(packages))
    lines = [
        f"{user}\t{(7 * user + place**2) % 30}\t3\t{place}"
        for user in range(9)
        for place in range(12)
    ]
    ratings.write_text("\n".join(["user_id:token\titem_id:token\trating\ttimestamp", *lines]))
    texts.mkdir()
    for name in range(2):
        (texts / f"{name}.txt").write_text(words(300, name))
    return ["--packages", index, "--ratings", ratings, "--texts", texts]


def test_the_study(tmp_path, data):
    content, lines = study.run(app, tmp_path / "out", "--quick", *data)
    assert lines[-1] == "million, random: 13 of 13"
    assert set(content["tables"]) == {"quality", "recommendation", "words", "million"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "words"], "--texts is needed for the section words"),
        (["--sections", "recommendation"], "--ratings is needed"),
        (["--sections", "words,prose"], "--sections must be one of quality"),
        (["--sections", "recommendation", "--ratings", "absent"], "is not MovieLens-100k"),
        (["--sections", "words", "--texts", "absent"], "is no folder or archive of texts"),
        (["--sections", "quality", "--packages", "absent"], "give one with --packages"),
    ],
)
def test_what_is_missing_is_named(arguments, message, tmp_path):
    assert message in commands.refusal(*arguments, "--output", tmp_path / "out", app=app)
