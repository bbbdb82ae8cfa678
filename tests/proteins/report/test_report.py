"""The page, its figures and its numbers."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from performers.proteins.inputs.fasta import ProteinRecord
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from performers.proteins.reading.mantel import compare_matrices, load_reference_matrix
from performers.proteins.reading.similarity import AMINO_ACIDS, top_pairs
from performers.proteins.report.page import ModelReport, analyse_model, write_report
from tests.proteins.report.page import Page

HOSTILE = "<script>alert(1)</script>\"'&$\\x_\x00\ud800é"
METRICS = {
    "test": {
        "accuracy": 0.2345,
        "perplexity": 11.5,
        "tokens": 12_345,
        "baseline_accuracy": 0.0967,
        "baseline_perplexity": 17.96,
    },
    "ood": {"accuracy": math.nan, "perplexity": np.float32(14.25), "loss": 2.6568},
}
HISTORY = [{"step": 10, "loss": 2.9}, {"step": 20, "eval_loss": 2.7, "eval_accuracy": 0.15}]


def _analysis(attention="eager", layers=2, heads=4, sites=(), **fields):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=16,
        initializer_range=0.5,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    generator = np.random.default_rng(0)
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    sequences = ["".join(generator.choice(letters, size=60)) for _ in range(6)]
    record = {"name": "P1", "description": "", "sequence": sequences[0], **fields}
    return analyse_model(
        BertForMaskedLM(config),
        build_protein_tokenizer(closed=True),
        sequences,
        protein=ProteinRecord(**record),
        max_sequences=5,
        max_length=42,
        sites=sites,
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    analysis = _analysis(name=HOSTILE, description=HOSTILE)
    models = [
        ModelReport(HOSTILE, {HOSTILE: HOSTILE, "layers": 2}, METRICS, HISTORY, analysis),
        ModelReport("exact", {}, METRICS, HISTORY, _analysis("sdpa")),
        ModelReport("exact"),
    ]
    return write_report(folder, models=models, title=HOSTILE, permutations=99)


def test_the_page_is_self_contained_and_holds_what_was_given_and_read(full):
    page = Page(full)
    page.assert_self_contained()
    for shown in ("prefers-color-scheme: dark", "@media print", "é"):
        assert shown in page.source
    assert "<script" not in page.source
    assert "\x00" not in page.source
    text = page.text
    for expected in (
        "23.45%",
        "9.67%",
        "17.96",
        "12,345",
        # log(11.5), log(17.96): losses are filled in from the perplexities.
        "2.442",
        "2.888",
        "14.25",
        "–",
        "40 of 60 residues",
        "5 of 6 sequences",
        "first 42 tokens",
        "uniform attention",
        "most local",
        "most vertical",
        "All attention",
        "Attention above 0.1",
        "BLOSUM62",
        "99 relabellings",
        "no attention weights",
        "was not analysed",
        "alert(1)</script>",
        "No training log",
        "No metrics",
    ):
        assert expected in text, expected


def test_figures_lie_beside_the_page(full):
    names = sorted(file.name for file in (full.parent / "figures").iterdir())
    hostile = "1-script-alert-1-script-x"
    assert names == [
        f"{hostile}-attention.png",
        f"{hostile}-embeddings.png",
        f"{hostile}-learning-curve.png",
        f"{hostile}-similarity.png",
        "2-exact-embeddings.png",
        "2-exact-learning-curve.png",
        "learning-curves.png",
    ]
    assert len(Page(full).values("src")) == len(names)
    files = sorted(file.name for file in full.parent.iterdir())
    assert files == ["figures", "report.html", "report.json"]


def test_values_of_the_analysis_are_the_ones_printed(tmp_path):
    analysis = _analysis(layers=14, heads=2)
    reference = load_reference_matrix("PAM250", AMINO_ACIDS)
    matrix = analysis.similarity.similarity()
    found = compare_matrices(matrix, reference, name="PAM250", permutations=199)
    first, second, _ = top_pairs(matrix, 1)[0]
    report = write_report(
        tmp_path,
        models=[ModelReport("m", analysis=analysis)],
        matrix_name="PAM250",
        permutations=199,
    )
    text = Page(report).text
    assert f"{found.pearson:.3f}" in text
    assert f"{found.spearman:.3f}" in text
    assert f"{found.p_value:.4f}" in text
    assert f"{first}–{second}" in text
    assert analysis.scores.most_vertical(1)[0].label in text
    assert "12 of 14 layers are drawn" in text
    assert "PAM250" in text


def test_the_numbers_of_the_page_are_beside_it(full):
    numbers = json.loads((full.parent / "report.json").read_text(encoding="utf-8"))
    shown, fused, bare = numbers["models"]
    assert shown["name"] == HOSTILE
    assert shown["settings"]["layers"] == 2
    assert shown["metrics"]["test"]["accuracy"] == 0.2345
    assert shown["metrics"]["ood"] == {"accuracy": None, "perplexity": 14.25, "loss": 2.6568}
    assert shown["history"] == HISTORY
    assert len(shown["learnt"]["heads"]) == 8
    similarity = shown["learnt"]["similarity"]
    assert similarity["sequences"] == 5
    assert list(similarity["all"]["matrices"]) == ["BLOSUM62", "BLOSUM45", "BLOSUM80"]
    text = Page(full).text
    for kind in ("all", "thresholded"):
        for result in similarity[kind]["matrices"].values():
            for name, digits in (("pearson", 3), ("spearman", 3), ("spearman_p_value", 4)):
                assert f"{result[name]:.{digits}f}" in text
        for pair in similarity[kind]["expected_pairs"]:
            assert f"{pair['rank']} of 190" in text
    for model in (shown, fused):
        embeddings = model["learnt"]["embeddings"]
        for result in embeddings["matrices"].values():
            assert f"{result['pearson']:.3f}" in text
            assert f"{result['p_value']:.4f}" in text
        for pair in embeddings["expected_pairs"]:
            assert f"{pair['rank']} of 190" in text
        assert ", ".join(pair["pair"] for pair in embeddings["top_pairs"]) in text
    assert "no attention weights" in fused["learnt"]["problem"]
    assert fused["learnt"]["similarity"] is None
    assert bare["learnt"] is None


def test_models_are_put_side_by_side(tmp_path):
    sites = (3, 7, 39)
    models = [
        ModelReport("one", analysis=_analysis(sites=sites)),
        ModelReport("one", analysis=_analysis(layers=3, heads=2, sites=sites)),
        ModelReport("fused", analysis=_analysis("sdpa")),
    ]
    page = Page(write_report(tmp_path, models=models, permutations=9))
    text = page.text.split("Settings")[0]
    assert "side by side" in text
    pairs = ("D–E", "F–Y", "I–V", "K–R")
    for expected in ("1. one", "2. one", "BLOSUM45", "BLOSUM80", "embeddings", *pairs):
        assert expected in text, expected
    figures = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"heads.png", "similarities.png", "1-one-attention.png"} <= figures
    for analysis in (models[0].analysis, models[1].analysis):
        assert analysis is not None
        assert analysis.sites is not None
        for site in analysis.sites.sites:
            assert f"{site.residue}{site.site}" in text
            assert f"{site.enrichment:.2f}× ({site.head})" in text


@pytest.mark.exhaustive
def test_known_sites_are_marked_and_tabled(tmp_path):
    plain, marked, beyond = (_analysis(sites=sites) for sites in ((), (3, 7), (3, 41, 50)))
    pages = [
        write_report(tmp_path / name, models=[ModelReport("m", analysis=analysis)], permutations=9)
        for name, analysis in (("plain", plain), ("marked", marked), ("beyond", beyond))
    ]
    maps = [(page.parent / "figures" / "1-m-attention.png").read_bytes() for page in pages]
    assert len(set(maps)) == 3
    without, with_sites, further = (Page(page).text for page in pages)
    assert "known site" not in without
    assert f"p = {marked.sites.p_value:.4f}" in with_sites
    assert "Beyond the residues that were read: 41, 50." in further


def test_what_is_missing_is_explained_and_what_is_more_is_listed(tmp_path):
    metrics = {"test": {"accuracy": 0.5, "seconds": 12.5}}
    models = [ModelReport("small", metrics=metrics, analysis=_analysis(layers=1, heads=2))]
    text = Page(write_report(tmp_path / "a", models=models)).text
    for words in ("a correlation needs at least 3", "no comparison with BLOSUM62 could be made"):
        assert words in text
    assert "seconds" in text
    assert "12.5000" in text
    again = write_report(tmp_path / "b", models=models)
    assert again.read_bytes() == (tmp_path / "a" / "report.html").read_bytes()


def test_report_is_replaced_whole(tmp_path):
    write_report(tmp_path, models=[ModelReport("model one")])
    with pytest.raises(ValueError, match="BLOSUM1"):
        write_report(
            tmp_path, models=[ModelReport("second", analysis=_analysis())], matrix_name="BLOSUM1"
        )
    assert "model one" in Page(tmp_path / "report.html").text
    write_report(tmp_path, models=[ModelReport("third")])
    assert "model one" not in Page(tmp_path / "report.html").text


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="models"):
        write_report(tmp_path, models=[])
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        write_report(blocked, models=[ModelReport("m")])
