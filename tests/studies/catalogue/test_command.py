"""``python -m studies.catalogue``: its results on made-up data, and refusals."""

import pytest
import torch

from studies.catalogue import million
from studies.catalogue.__main__ import app
from tests.cli import commands
from tests.studies import study


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Options of a tiny package index, ratings and texts."""
    monkeypatch.setattr(million, "run_apart", lambda call, threads: call())
    numbers = torch.Generator().manual_seed(0)

    def some(most, size):
        return torch.randint(most, (size,), generator=numbers).tolist()

    index, ratings = tmp_path / "Packages", tmp_path / "ml-100k.inter"
    index.write_text(
        "\n\n".join(
            f"Package: p{i}\nDepends: {', '.join(f'p{j} (>= 1)' for j in some(120, 6))}"
            for i in range(120)
        )
    )
    lines = [
        f"{user}\t{item}\t3\t{place}"
        for user in range(9)
        for place, item in enumerate(some(30, 12))
    ]
    ratings.write_text("\n".join(["user_id:token\titem_id:token\trating\ttimestamp", *lines]))
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in range(2):
        words = " ".join("abcdefghij"[i] for i in some(10, 300))
        (texts / f"{name}.txt").write_text(words)
    return ["--packages", index, "--ratings", ratings, "--texts", texts]


def test_the_study(tmp_path, data):
    content, lines = study.run(app, tmp_path / "out", "--quick", *data)
    assert lines[-1] == "million, random: 13 of 13"
    assert set(content["tables"]) == {"quality", "recommendation", "words", "million"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sections", "words"], "--texts is needed for the section words"),
        (["--sections", "recommendation"], "--ratings is needed"),
        (["--sections", "words,prose"], "--sections must be one of quality"),
        (["--sections", "recommendation", "--ratings", "absent"], "is not MovieLens-100k"),
        (["--sections", "words", "--texts", "absent"], "is no folder or archive of texts"),
        (["--sections", "quality", "--packages", "absent"], "give one with --packages"),
    ],
)
def test_what_is_missing_is_named(arguments, words, tmp_path):
    assert words in commands.refusal(*arguments, "--output", tmp_path / "out", app=app)
