"""``performers evaluate``, ``embed``, ``generate`` and ``report`` on models that are there."""

import hashlib
import json
import re

import numpy as np
import pyarrow.parquet
import pytest
import torch

from performers.models.manifest import save_model_folder
from performers.proteins.inputs.fasta import read_fasta
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.model_folder import load_model
from performers.proteins.scoring.embedding import embed_sequences
from performers.proteins.scoring.evaluation import evaluate_model
from tests.cli.commands import arrays, refusal, run
from tests.proteins.runs import make_model, proteins

KEYS = {"accuracy", "perplexity", "loss", "tokens", "baseline_accuracy", "baseline_perplexity"}


@pytest.fixture(params=["masked", "causal"])
def model(request):
    return request.getfixturevalue(request.param)


def test_evaluate_prints_what_the_library_computes(model, fasta):
    options = {"max_length": 20, "mask_probability": 0.4, "seed": 3}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    out, _ = run("evaluate", model, fasta, "--json", "--batch-tokens", 64, *arguments)
    metrics = json.loads(out)
    made = metrics.pop("provenance")
    assert made["schema"] == "performers/evaluation/1"
    assert made["seed"] == 3
    weights = (model / "model.safetensors").read_bytes()
    assert made["model"] == {"path": str(model), "sha256": hashlib.sha256(weights).hexdigest()}
    assert made.keys() == {"schema", "date", "command", "versions", "seed", "model"}
    assert metrics.keys() == KEYS | {"sequences"}
    expected = evaluate_model(*load_model(model), proteins(), **options)
    assert metrics == pytest.approx(expected, rel=1e-5)
    out, _ = run("evaluate", model, fasta, *arguments)
    assert f"{100 * metrics['accuracy']:.2f}%" in out
    assert f"{metrics['baseline_perplexity']:.3f}" in out


def test_evaluate_says_so_when_a_model_diverged(fasta, tmp_path):
    model, tokenizer = make_model()
    with torch.no_grad():
        model.lm_head.bias.fill_(float("nan"))
    save_model_folder(tmp_path, model, tokenizer)
    _, lines = run("evaluate", tmp_path, fasta, "--json", code=2)
    assert "predicts no finite probabilities (loss nan)" in lines[-1]


def test_ctrl_c_exits_with_130(masked, fasta, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("performers.proteins.scoring.evaluation.evaluate_model", interrupt)
    assert refusal("evaluate", masked, fasta, code=130) == "interrupted"


def test_embed_keeps_order_and_duplicate_names(causal, tmp_path):
    path = tmp_path / "in.fasta"
    sequences = proteins(9)
    path.write_text("".join(f">{'aba'[n % 3]} x\n{s}\n" for n, s in enumerate(sequences)))
    expected = embed_sequences(*load_model(causal), sequences)
    _, lines = run("embed", causal, path, "--output", tmp_path / "x.npz", "--batch-tokens", 100)
    assert lines[-1] == f"9 vectors of width 16 in {tmp_path / 'x.npz'}"
    run("embed", causal, path, "--output", tmp_path / "new" / "x.parquet")
    found = arrays(tmp_path / "x.npz")
    table = pyarrow.parquet.read_table(tmp_path / "new" / "x.parquet")
    assert found["names"].tobytes().decode().split() == table["name"].to_pylist() == list("aba" * 3)
    assert found["lengths"].tolist() == table["length"].to_pylist() == [len(s) for s in sequences]
    np.testing.assert_allclose(found["embeddings"], expected, atol=2e-5)
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, atol=2e-5)


def test_generate_writes_fasta_to_standard_output_or_a_file(causal, tmp_path):
    arguments = ["--prompt", "MKT", "--num", 4, "--max-length", 30, "--seed", 5]
    out, _ = run("generate", causal, *arguments)
    assert re.match(r">generated-1 length=\d+", out)
    printed = tmp_path / "printed.fasta"
    printed.write_text(out)
    for name in ("x.fasta", "x.fasta.gz"):
        assert run("generate", causal, *arguments, "--output", tmp_path / name)[0] == ""
        records, _ = read_fasta(tmp_path / name)
        assert records == read_fasta(printed)[0]
    assert len(records) == 4
    for record in records:
        assert record.sequence.startswith("MKT")
        assert set(record.sequence) <= set(AMINO_ACIDS)


def test_report_writes_its_page_with_the_relatives_that_a_protein_is_read_from(
    masked, fasta, tmp_path
):
    records, _ = read_fasta(fasta)
    relatives = tmp_path / "relatives.fasta"
    relatives.write_text(f">near\n{records[0].sequence[:-1]}W\n>far\n{records[1].sequence}\n")
    output = tmp_path / "report"
    given = ("--protein", records[0].name, "--relatives", relatives, "--relatives-tokens", 250)
    out, lines = run("report", masked, fasta, "--output", output, "--max-sequences", 5, *given)
    assert out == f"report: {output / 'report.html'}\n"
    markup = (output / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in markup
    assert not re.search(r"(src|url)\s*[=(]\s*['\"]?https?:", markup)
    assert "read with 2 relatives" in " ".join(lines)
    assert (output / "figures" / "relatives.png").exists()
