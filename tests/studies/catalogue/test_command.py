"""``python -m studies.catalogue``: its results on made-up data, and refusals."""

import json

import pytest
import torch

from performers.benchmark import memory
from studies.catalogue import million
from studies.catalogue.__main__ import app
from studies.pages import Table
from tests.cli import commands


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Options of a tiny package index, ratings and texts."""
    monkeypatch.setattr(million, "run_apart", lambda call, threads: call())
    monkeypatch.setattr(memory, "peak_of", lambda call: call())
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
    arguments = ["--output", tmp_path / "out", "--quick", *data]
    _, lines = commands.run(*arguments, app=app)
    assert lines[-1] == "million, random: 13 of 13"
    tables = json.loads((tmp_path / "out" / "results.json").read_text())["tables"]
    assert set(tables) == {"quality", "recommendation", "words", "million"}
    assert all(Table(**table).markdown() for table in tables.values())
    _, lines = commands.run(*arguments, "--resume", app=app)
    assert all(line.endswith("kept") for line in lines)


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
