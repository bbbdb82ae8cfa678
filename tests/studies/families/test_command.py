"""``python -m studies.families``: its results, and resuming."""

import json
import random

import pytest

from performers.app.files import write_json
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from studies.families.__main__ import app
from studies.families.experiments import REAL
from studies.families.training import CONTESTANTS
from tests.cli import commands
from tests.proteins.corpus.test_shards import write_corpus
from tests.studies import study


@pytest.fixture
def corpus(tmp_path):
    source = random.Random(0)
    folder, clusters, splits = tmp_path / "corpus", "", {}
    for split, count in (("train", 2), ("ood", 2)):
        records = []
        for family in range(count):
            ancestor = source.choices(AMINO_ACIDS, k=20)
            for member in range(8):
                name = f"{split}{family}.{member}"
                clusters += f"{split}{family}\t{name}\n"
                ancestor[source.randrange(20)] = source.choice(AMINO_ACIDS)
                records.append((name, "".join(ancestor)))
        splits[split] = records
    write_corpus(folder, splits)
    (folder / "clusters.tsv").write_text(clusters)
    return folder


def test_the_study(corpus, tmp_path, monkeypatch):
    # Which others there are is test_attentions.py's.
    contestants = {name: CONTESTANTS[name] for name in REAL}
    monkeypatch.setattr("studies.families.training.CONTESTANTS", contestants)
    # A process of its own is tests/benchmark/test_memory.py's.
    monkeypatch.setattr(
        "studies.families.experiments.run_apart", lambda measure, threads: measure()
    )
    out = tmp_path / "out"
    arguments = [
        "--corpus", corpus, "--included", corpus, "--relatives", "1,2", "--scored", 2,
        "--seeds", 2, "--copy-steps", 2, "--family-steps", 2, "--long-steps", 2,
        "--row-tokens", 100, "--batch-tokens", 320, "--hidden-size", 16, "--contexts", 512,
    ]  # fmt: skip
    content, _ = study.run(app, out, *arguments)
    assert set(content["tables"]) == {*("ceiling", "copying", "families", "included", "contexts")}
    parts = content["parts"]
    # A line is the mean of its seeds.
    found = [parts[f"copying, exact, seed {seed}"]["alone"]["accuracy"] for seed in (0, 1)]
    rows = {row[0]: row for row in content["tables"]["copying"]["rows"]}
    mean, deviation = rows["exact"][-2].split("% ± ")
    assert float(mean) == pytest.approx(50 * sum(found), abs=0.06)
    assert float(deviation) == pytest.approx(50 * 2**0.5 * abs(found[1] - found[0]), abs=0.06)
    assert {f"copying, {name}, seed 1" for name in REAL} < set(parts)
    for name in REAL:
        scores = parts[f"families, {name}, seed 1"]["scores"]["corpus"]
        assert set(scores) == {"0", "1", "2"}
        # The same residues as in the alignments.
        assert {x["tokens"] for x in scores.values()} == {parts["ceiling, corpus"]["tokens"]}
    assert f"families, {REAL[0]}, 2 steps, seed 0" in parts
    for most, counts in ((1, {"0", "1"}), (2, {"0", "1", "2"})):
        part = parts[f"included, with {most} relatives"]
        assert set(part["model"]) == set(part["aligned"]) == set(part["relatives"]) == counts
        assert part["aligned"]["0"] == part["model"]["0"]
        for name in ("model", "aligned"):
            assert {x["tokens"] for x in part[name].values()} == {part["tokens"]}
    read = parts["contexts, exact, 512 tokens"]
    assert (read["tokens"], read["members"]) == (512, 2)
    assert min(read["cpu_seconds"], read["mebibytes"]) > 0
    # Weights of copying are kept for a part that is missing.
    del parts["families, exact, seed 0"]
    (out / "results.json").write_text(json.dumps(content))
    assert "families, exact, seed 0" in study.run(app, out, *arguments, "--resume")[0]["parts"]
    # Parts of one corpus are not those of another.
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["ood"]["shards"][0]["sha256"] = "0"
    write_json(corpus / "manifest.json", manifest)
    line = commands.refusal(*arguments, "--resume", "--output", out, app=app)
    assert "corpus was" in line
