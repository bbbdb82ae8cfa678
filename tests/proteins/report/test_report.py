"""The page, its charts and its numbers."""

import json
import math

import numpy as np
import pytest

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, build_protein_tokenizer
from performers.proteins.reading.analysis import analyse_model
from performers.proteins.report import page
from performers.proteins.report.charts import RESIDUE_ORDER, learning_chart
from performers.proteins.report.page import ModelReport, write_report
from tests.proteins.reading.test_analysis import bert, sequences
from tests.proteins.report.page import Page
from tests.proteins.report.test_payload import reading

HOSTILE = "</script><script>alert(1)</script><!--\"'&$\\x_\x00\ud800\u2028é"
METRICS = {
    "test": {
        "accuracy": 0.2345,
        "perplexity": 11.5,
        "loss": 2.4423,
        "tokens": 12_345,
        "baseline_accuracy": 0.0967,
        "baseline_perplexity": 17.96,
    }
}
# Of a model whose training diverged.
METRICS["ood"] = {**METRICS["test"], "accuracy": math.nan, "perplexity": np.float32(14.25)}
HISTORY = [
    {"step": 10, "loss": 2.9, "learning_rate": 1e-3},
    {"step": 20, "loss": 2.7},
    {"step": 20, "eval_loss": 2.8, "eval_accuracy": 0.12, "eval_ood_loss": 2.85},
    {"step": 20, "train_loss": 2.75, "train_runtime": 3.0},
]
SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"


def _analysis(attention="eager", layers=2, heads=4, sites=(), **fields):
    drawn = sequences(6, 60, 61)
    record = {"name": "P1", "description": "", "sequence": drawn[0], **fields}
    return analyse_model(
        bert(attention, num_hidden_layers=layers, num_attention_heads=heads),
        build_protein_tokenizer(closed=True),
        drawn,
        protein=ProteinRecord(**record),
        max_sequences=5,
        max_length=42,
        sites=sites,
    )


def described(name="m", **fields):
    """A model of a report, described by little unless `fields` say more."""
    fields = {
        "settings": {},
        "metrics": METRICS,
        "history": [],
        "is_causal": False,
        "proteins": [reading("one", SEQUENCE)],
        "available": 1,
        **fields,
    }
    if "analysis" not in fields:
        fields["analysis"] = _analysis(layers=1, heads=2)
    return ModelReport(name, **fields)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    analysis = _analysis(name=HOSTILE, description=HOSTILE)
    proteins = [
        reading(HOSTILE, SEQUENCE, f"{HOSTILE} kind={HOSTILE}", 1),
        reading("x" * 10_000, SEQUENCE[:20], "kind=b " + "y" * 10_000, 2),
        *(reading(f"p{n}", SEQUENCE * 2, "kind=b", n) for n in range(3, 6)),
    ]
    models = [
        described(
            HOSTILE,
            settings={HOSTILE: HOSTILE, "layers": 2},
            history=HISTORY,
            analysis=analysis,
            proteins=proteins,
            available=7,
        ),
        described("exact", history=HISTORY, analysis=_analysis("sdpa"), proteins=[]),
    ]
    return write_report(folder, models=models, title=HOSTILE, permutations=99, max_residues=190)


def test_the_page_is_self_contained_and_holds_what_was_given_and_read(full):
    found = Page(full)
    found.assert_self_contained()
    assert len(found.source) < 2_000_000
    for shown in ("prefers-color-scheme: dark", "@media print", "é"):
        assert shown in found.source
    assert "\x00" not in found.source
    assert "x" * 100 not in found.source
    for expected in (
        "23.45%",
        "9.67%",
        "17.96",
        "12,345",
        "2.442",
        # The logarithm of 17.96.
        "2.888",
        "14.25",
        "–",
        "first 40 of 60 residues",
        "5 of 6 sequences",
        "attention above 0.1",
        "BLOSUM62",
        "no attention weights",
        "alert(1)</script>",
        "5 of 7 proteins are shown",
        "--max-sequences",
        "--max-residues",
    ):
        assert expected in found.text, expected


def test_three_sentences_come_first(full):
    source = full.read_text(encoding="utf-8")
    first, second, third = (text.strip() for text in source.split('<p class="lead">')[1:])
    assert first.startswith("This page shows 5 of the 7 proteins (251 amino acids; 20 to 66 long)")
    assert "guesses 23.4% right, against 9.7%" in second
    assert "11.5 equally likely amino acids (18.0 by frequencies alone)" in second
    assert third.startswith("The most familiar protein to it is p")


@pytest.mark.parametrize(
    ("accuracy", "verdict"), [(0.101, "no better than 10.0%"), (0.2, "against 10.0%")]
)
def test_a_model_that_learnt_nothing_is_told(accuracy, verdict, tmp_path):
    learnt = {"accuracy": accuracy, "baseline_accuracy": 0.1, "tokens": 1000}
    models = [described(metrics={"x": {**METRICS["test"], **learnt}})]
    text = Page(write_report(tmp_path, models=models, permutations=9)).text
    assert verdict in text
    assert "the stretch it knows best is residues" in text


def test_the_data_hold_each_protein_and_the_guesses_that_fit(full):
    data = Page(full).data
    assert [protein["length"] for protein in data["proteins"]] == [33, 20, 66, 66, 66]
    assert data["proteins"][1]["name"] == "x" * 59 + "…"
    assert list(data["tracks"]) == ["0", "1", "2", "3"]
    assert data["tracks"]["2"]["sequence"] == SEQUENCE * 2
    assert data["labels"] == ["kind"]
    titles = [colour["title"] for colour in data["colours"]]
    assert titles == ["surprise (bits)", "length (residues)", "kind"]
    assert len(data["charts"]["map"]["data"]["values"]) == 5
    assert list(data["maps"]) == ["maps-0"]
    assert [head["layer"] for head in data["maps"]["maps-0"]["heads"]] == [1] * 4 + [2] * 4


def test_a_label_of_the_name_of_a_number_is_a_colouring_of_its_own(tmp_path):
    proteins = [reading(f"p{n}", SEQUENCE, f"length={'ab'[n % 2]}", seed=n) for n in range(4)]
    models = [described(proteins=proteins)]
    data = Page(write_report(tmp_path, models=models, permutations=9)).data
    fields = {colour["title"]: colour["field"] for colour in data["colours"]}
    assert fields == {
        "surprise (bits)": "surprise",
        "length (residues)": "length",
        "length": "label0",
    }


def test_pictures_of_the_charts_lie_beside_the_page(full):
    for file in (full.parent / "figures").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
    names = {file.name for file in (full.parent / "figures").iterdir()}
    assert names == {
        *("map.png", "learning-loss.png", "learning-accuracy.png"),
        *(f"similarity-{n}.png" for n in range(4)),
    }
    assert {name.removesuffix(".png") for name in names} | {"track"} == set(
        Page(full).data["charts"]
    )
    files = sorted(file.name for file in full.parent.iterdir())
    assert files == ["figures", "report.html", "report.json"]


def test_the_numbers_of_the_page_are_beside_it(full):
    numbers = json.loads((full.parent / "report.json").read_text(encoding="utf-8"))
    shown, fused = numbers["models"]
    assert shown["name"] == HOSTILE
    assert shown["settings"]["layers"] == 2
    assert shown["metrics"]["test"]["accuracy"] == 0.2345
    assert shown["metrics"]["ood"]["accuracy"] is None
    assert shown["metrics"]["ood"]["perplexity"] == 14.25
    assert shown["history"] == HISTORY
    assert len(shown["learnt"]["heads"]) == 8
    assert [protein["length"] for protein in shown["proteins"]] == [33, 20, 66, 66, 66]
    similarity = shown["learnt"]["similarity"]
    assert list(similarity["all"]["matrices"]) == ["BLOSUM62", "BLOSUM45", "BLOSUM80"]
    found = Page(full)
    drawn = found.data["charts"]["similarity-1"]["data"]["values"]
    assert len(drawn) == 380
    for cell in drawn[::37]:
        row, column = (AMINO_ACIDS.index(cell[key]) for key in ("row", "column"))
        value = similarity["all"]["matrix"][row][column]
        assert cell["value"] == pytest.approx(value, abs=6e-4)
    assert sorted(RESIDUE_ORDER) == sorted(AMINO_ACIDS)
    for model in (shown, fused):
        learnt = model["learnt"]
        parts = [learnt["embeddings"], *([] if model is fused else [similarity["all"]])]
        for part in parts:
            for result in part["matrices"].values():
                for name, digits in (("pearson", 3), ("spearman", 3), ("spearman_p_value", 4)):
                    assert f"{result[name]:.{digits}f}" in found.text
            for pair in part["expected_pairs"]:
                assert f"{pair['pair']} {pair['rank']}" in found.text
    assert "no attention weights" in fused["learnt"]["problem"]
    assert fused["learnt"]["similarity"] is None


def test_models_are_put_side_by_side_and_sites_are_tabled(tmp_path):
    sites = (3, 7, 50)
    models = [
        described("one", analysis=_analysis(sites=sites)),
        described("one", analysis=_analysis(layers=3, heads=2, sites=sites)),
        described("fused", analysis=_analysis("sdpa")),
    ]
    found = Page(write_report(tmp_path, models=models, permutations=9))
    for expected in ("1. one", "2. one", "BLOSUM45", "BLOSUM80", "D–E", "F–Y", "I–V", "K–R"):
        assert expected in found.text, expected
    assert list(found.data["maps"]) == ["maps-0", "maps-1"]
    assert found.values("data-maps") == ["maps-0", "maps-1"]
    assert found.data["maps"]["maps-0"]["sites"] == [3, 7]
    assert "Beyond the residues that were read: 50." in found.text
    for analysis in (models[0].analysis, models[1].analysis):
        assert f"p = {analysis.sites['p_value']:.4f}" in found.text
        for site in analysis.sites["sites"]:
            assert f"{site['residue']}{site['site']}" in found.text
            assert f"{site['enrichment']:.2f}×" in found.text


def test_what_is_missing_is_explained(tmp_path):
    models = [described(analysis=_analysis(layers=1, heads=2))]
    text = Page(write_report(tmp_path / "a", models=models, permutations=9)).text
    for words in (
        "a correlation needs at least 3",
        "no comparison with BLOSUM62 could be made",
        "no training log",
    ):
        assert words in text
    again = write_report(tmp_path / "b", models=models, permutations=9)
    assert again.read_bytes() == (tmp_path / "a" / "report.html").read_bytes()


def test_many_long_proteins_stay_below_two_megabytes(tmp_path):
    proteins = [
        reading(f"protein-{n}", SEQUENCE * 60, f"kind={n % 9} " + "long description " * 30)
        for n in range(300)
    ]
    analysis = _analysis(layers=24, heads=8, sequence=SEQUENCE * 10)
    model = described(history=HISTORY, analysis=analysis, proteins=proteins, available=300)
    found = Page(write_report(tmp_path, models=[model], permutations=9))
    assert len(found.source.encode()) < 2_000_000
    assert "holds the residues of 25 of these 300 proteins" in found.text


def test_a_trainer_log_becomes_curves():
    def curves(history, metric):
        lines = {}
        for point in learning_chart({"m": history}, metric, 2.0)["layer"][0]["data"]["values"]:
            lines.setdefault(point["part"], []).append((point["step"], point["value"]))
        return lines

    assert curves(HISTORY, "loss") == {
        "train": [(10, 2.9), (20, 2.7)],
        "validation": [(20, 2.8)],
        "ood": [(20, 2.85)],
    }
    assert curves(HISTORY, "accuracy") == {"validation": [(20, 0.12)]}
    # What is not finite is left out, and the last of a repeated step counts.
    points = [(1, math.nan), (2, 1.0), (3, np.float32(1.5)), (2, 1.25)]
    history = [{"step": step, "loss": loss} for step, loss in points]
    assert curves(history, "loss") == {"train": [(2, 1.25), (3, 1.5)]}
    assert learning_chart({"a": []}, "loss", 2.0) is None


def test_report_is_replaced_whole(tmp_path, monkeypatch):
    write_report(tmp_path, models=[described("model one")], permutations=9)
    with monkeypatch.context() as broken:
        broken.setattr(page.charts, "png", lambda chart: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(tmp_path, models=[described("second")], permutations=9)
    assert "model one" in Page(tmp_path / "report.html").source
    write_report(tmp_path, models=[described("third")], permutations=9)
    assert "model one" not in Page(tmp_path / "report.html").source
