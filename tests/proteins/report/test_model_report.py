"""The report on trained models, from their folders."""

import json

import pytest

from performers.app.errors import UserError
from performers.app.files import write_json
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import Relatives
from performers.proteins.model import load
from performers.proteins.report.model_report import choose_protein, report_on_model
from tests.proteins.report.page import Page
from tests.proteins.runs import make_model_folder, proteins

RECORDS = [ProteinRecord(f"p{n}", "", letters) for n, letters in enumerate(proteins(8, 20, 60))]


def write(folder, output, records=RECORDS, compare=(), **options):
    """The text of the page, the numbers beside it, and the names of the steps reported."""
    seen = []
    options["report"] = lambda name, *progress: seen.append(name)
    path = report_on_model([load(x) for x in (folder, *compare)], records, output, **options)
    assert path == output / "report.html"
    page = Page(path)
    page.assert_self_contained()
    return page.text, json.loads((output / "report.json").read_text())["models"], set(seen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_model_folder(tmp_path_factory.mktemp("models") / "a <b>model")
    record = {
        "options": {"objective": "mlm", "steps": 123_456, "batch_tokens": 77},
        "data": {"sequences": 4321},
        "result": {"seconds": 98.76},
    }
    write_json(path / "training.json", record)
    entries = [{"step": 1, "loss": 3.4}, {"step": 2, "loss": 3.1}, {"step": 2, "eval_loss": 3.2}]
    write_json(path / "trainer_state.json", {"log_history": entries})
    return path


def test_the_page_tells_settings_and_escapes_names(folder, tmp_path):
    hostile = ProteinRecord("<img/src=x>", "&<script>alert(1)</script>", RECORDS[0].sequence)
    text, _, seen = write(folder, tmp_path, [*RECORDS, hostile], protein="<img/src=x>")
    for words in ("<img/src=x>", "a <b>model", "123", "4321", "98.76", "77", "favor-softmax"):
        assert words in text
    assert "Learning curve" in text
    assert "no training log" not in text
    steps = ("reading attention", "guessing each residue")
    assert seen == {"evaluating", *(f"{step}, a <b>model" for step in steps)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("attention", ["favor-relu", "exact", "identity"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_every_kind_of_model_has_a_report(tmp_path, attention, objective):
    folder = make_model_folder(tmp_path / "model", objective, attention=attention)
    text, _, _ = write(folder, tmp_path / "report", max_sequences=4)
    assert "no training log" in text
    assert "BLOSUM62" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        # With positions for 16 tokens, what is read is cropped.
        ({"exact_layers": [0], "position_embedding": "learned", "max_length": 16}, True),
        ({"exact_layers": [0, 1]}, False),
    ],
)
def test_the_number_of_features_is_told_where_there_are_some(tmp_path, options, told):
    folder = make_model_folder(tmp_path / "model", num_features=24, **options)
    text, _, _ = write(folder, tmp_path / "report", max_sequences=4)
    assert ("random features per head" in text) is told


def test_a_protein_is_chosen_by_name_or_by_length():
    lengths = {"long": 500, "short": 10, "fits": 100, "fits-too": 90}
    records = [ProteinRecord(name, "", "M" * length) for name, length in lengths.items()]
    assert choose_protein(records, None, 256).name == "fits"
    assert choose_protein(records, "long", 256).name == "long"
    assert choose_protein(records[:2], None, 256).name == "short"
    assert choose_protein(records[:1], None, 256).name == "long"
    accessions = [ProteinRecord(name, "", "M") for name in ("sp|P1|A_X", "sp|P2|B_X", "P1")]
    assert choose_protein(accessions, "P2", 256) is accessions[1]
    assert choose_protein(accessions, "P1", 256) is accessions[2], "a name comes first"
    with pytest.raises(UserError, match=r"--protein 'x' is not in .* first are long, short, fits"):
        choose_protein(records, "x", 256)


@pytest.mark.exhaustive
def test_models_are_compared_and_sites_come_from_the_header(folder, tmp_path):
    other = make_model_folder(tmp_path / "exact", attention="exact")
    named = ProteinRecord("enzyme", "x sites=5,9,2", RECORDS[0].sequence)
    text, numbers, seen = write(
        folder, tmp_path / "report", [named, *RECORDS], protein="enzyme", compare=[other]
    )
    assert "The models" in text
    assert {"evaluating", "evaluating exact", "reading attention, exact"} <= seen
    assert [model["name"] for model in numbers] == ["a <b>model", "exact"]
    for model in numbers:
        assert [site["site"] for site in model["learnt"]["sites"]["sites"]] == [2, 5, 9]
        assert model["metrics"]["given sequences"]["tokens"] > 0
    _, numbers, _ = write(folder, tmp_path / "given", [named], sites="7")
    assert [s["site"] for s in numbers[0]["learnt"]["sites"]["sites"]] == [7]


def test_the_page_shows_so_many_proteins_with_labels(folder, tmp_path):
    labels = {"p1": ("kinase", "membrane"), "p7": ("kinase",)}
    text, numbers, _ = write(folder, tmp_path, max_sequences=3, protein="p7", labels=labels)
    shown = [protein["name"] for protein in numbers[0]["proteins"]]
    assert len(shown) == 3
    assert "p7" in shown
    assert "3 of 8 proteins are shown" in text
    data = Page(tmp_path / "report.html").data
    assert data["labels"] == ["label"]
    assert [protein["name"] for protein in data["proteins"]] == shown
    assert {p["name"]: p["label0"] for p in data["proteins"]}["p7"] == "kinase"


def test_labels_are_of_names_or_accessions(folder, tmp_path):
    records = [ProteinRecord(f"sp|P{n}|A_X", "", RECORDS[n].sequence) for n in range(3)]
    write(folder, tmp_path, records, labels={"P1": ("kinase",), "sp|P2|A_X": ("membrane",)})
    data = Page(tmp_path / "report.html").data
    assert [p["label0"] for p in data["proteins"]] == ["none", "kinase", "membrane"]
    with pytest.raises(UserError, match=r"--labels names none .* 'sp\|P0\|A_X', .* such as 'Q1'"):
        write(folder, tmp_path, records, labels={"Q1": ("kinase",)})


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (RECORDS[0], {"protein": "none"}, "--protein 'none' is not in the FASTA files"),
        (RECORDS[0], {"sites": "0"}, "from 1 to"),
        (RECORDS[0], {"sites": "3,"}, "numbers of residues"),
        (RECORDS[0], {"sites": "999"}, "got 999"),
        (ProteinRecord("p", "sites=1,x", "MKV"), {}, "sites= in the header of p must be numbers"),
    ],
)
def test_what_is_not_in_the_file_stops_before_the_work(folder, tmp_path, record, options, message):
    with pytest.raises(UserError, match=message):
        write(folder, tmp_path / "new", [record], **options)
    assert not (tmp_path / "new").exists()


def test_relatives_that_a_protein_is_read_from(folder, tmp_path):
    relatives = Relatives([*RECORDS[1:3], RECORDS[0]], load(folder).tokenizer, 150)
    text, models, _ = write(folder, tmp_path, relatives=relatives, protein="p0")
    assert "Relatives that p0 is read from" in text
    assert "after 2 relatives" in " ".join(text.split())
    found = models[0]["relatives"]
    assert found["protein"] == "p0"
    assert [entry["name"] for entry in found["shares"]] == ["p1", "p2"]
    assert len(found["shares"][0]["shares"]) == len(RECORDS[0].sequence)
    assert (tmp_path / "figures" / "relatives.png").exists()
