"""The report on a trained model: one page that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest

from performers.app.errors import UserError
from performers.app.files import write_json
from performers.proteins.inputs.fasta import ProteinRecord
from performers.proteins.model_folder import load_model
from performers.proteins.report.model_report import choose_protein, report_on_model
from tests.proteins.runs import make_model_folder, proteins

RECORDS = [ProteinRecord(f"p{n}", "", letters) for n, letters in enumerate(proteins(8, 20, 60))]


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, markup):
        super().__init__()
        self.loaded, self.tags, self.text = [], set(), ""
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in {"src", "srcset", "poster", "data"} or (tag == "link" and name == "href"):
                self.loaded.append(value)

    def handle_data(self, data):
        self.text += data


def write(folder, output, **options):
    model, tokenizer = load_model(folder)
    path = report_on_model(
        folder, model, tokenizer, options.pop("records", RECORDS), output, **options
    )
    assert path == output / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_model_folder(tmp_path_factory.mktemp("models") / "a <b>model")
    write_json(
        path / "training.json",
        {
            "options": {"objective": "mlm", "steps": 123_456, "batch_tokens": 77},
            "data": {"sequences": 4321},
            "result": {"seconds": 98.76},
        },
    )
    entries = [{"step": 1, "loss": 3.4}, {"step": 2, "loss": 3.1}, {"step": 2, "eval_loss": 3.2}]
    write_json(path / "trainer_state.json", {"log_history": entries})
    return path


def test_the_page_loads_nothing_and_escapes_names(folder, tmp_path):
    hostile = ProteinRecord("<img/src=x>", "&<script>alert(1)</script>", RECORDS[0].sequence)
    seen = []
    markup = write(
        folder,
        tmp_path,
        records=[*RECORDS, hostile],
        protein="<img/src=x>",
        report=lambda *progress: seen.append(progress),
    )
    page = Page(markup)
    assert not page.tags & {"script", "iframe", "object", "embed"}
    assert page.loaded, "a report has figures"
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert not re.search(r"url\(\s*['\"]?(?!data:)|@import", markup)
    assert "<img/src=x>" in page.text
    assert "a <b>model" in page.text
    for setting in ("123", "4321", "98.76", "77", "favor-softmax"):
        assert setting in page.text
    assert "learning curve" in page.text.lower()
    assert "No training log" not in page.text
    assert {name for name, *_ in seen} == {
        "evaluating",
        "reading attention, a <b>model",
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("attention", ["favor-relu", "exact", "identity"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_every_kind_of_model_has_a_report(tmp_path, attention, objective):
    folder = make_model_folder(tmp_path / "model", objective, attention=attention)
    markup = write(folder, tmp_path / "report", max_sequences=4)
    assert "No training log" in markup
    assert "BLOSUM62" in markup


@pytest.mark.parametrize("exact_layers", [[0], [0, 1]])
def test_a_first_layer_without_features(tmp_path, exact_layers):
    """Their number is that of the other layers, and is left out where there are none."""
    folder = make_model_folder(tmp_path / "model", exact_layers=exact_layers, num_features=24)
    markup = write(folder, tmp_path / "report", max_sequences=4)
    assert ("random features per head" in markup) == (exact_layers == [0])


def test_learned_positions_crop_what_is_read(tmp_path):
    folder = make_model_folder(tmp_path / "model", position_embedding="learned", max_length=16)
    assert "data:image/" in write(folder, tmp_path / "report")


def test_a_protein_is_chosen_by_name_or_by_length():
    records = [
        ProteinRecord("long", "", "M" * 500),
        ProteinRecord("short", "", "M" * 10),
        ProteinRecord("fits", "", "M" * 100),
        ProteinRecord("fits-too", "", "M" * 90),
    ]
    assert choose_protein(records, None, 256).name == "fits"
    assert choose_protein(records, "long", 256).name == "long"
    assert choose_protein(records[:2], None, 256).name == "short"
    assert choose_protein(records[:1], None, 256).name == "long"
    with pytest.raises(UserError, match=r"--protein 'x' is not in .* first are long, short, fits"):
        choose_protein(records, "x", 256)


@pytest.mark.exhaustive
def test_models_are_compared_and_sites_come_from_the_header(folder, tmp_path):
    other = make_model_folder(tmp_path / "exact", attention="exact")
    named = ProteinRecord("enzyme", "x sites=5,9,2", RECORDS[0].sequence)
    seen = []
    markup = write(
        folder,
        tmp_path / "report",
        records=[named, *RECORDS],
        protein="enzyme",
        compare=[(other, *load_model(other))],
        report=lambda name, *progress: seen.append(name),
    )
    text = Page(markup).text
    assert "side by side" in text
    assert {"evaluating", "evaluating exact", "reading attention, exact"} <= set(seen)
    numbers = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [model["name"] for model in numbers["models"]] == ["a <b>model", "exact"]
    for model in numbers["models"]:
        assert [site["site"] for site in model["learnt"]["sites"]["sites"]] == [2, 5, 9]
        assert model["metrics"]["given sequences"]["tokens"] > 0
    write(folder, tmp_path / "given", records=[named], sites="7")
    numbers = json.loads((tmp_path / "given" / "report.json").read_text())
    assert [s["site"] for s in numbers["models"][0]["learnt"]["sites"]["sites"]] == [7]


def test_sites_that_are_no_residues_stop_before_the_work(folder, tmp_path):
    for sites, message in (("0", "from 1 to"), ("3,", "numbers of residues"), ("999", "got 999")):
        with pytest.raises(UserError, match=message):
            write(folder, tmp_path / "new", sites=sites)
    record = ProteinRecord("p", "sites=1,x", "MKV")
    with pytest.raises(UserError, match="sites= in the header of p must be numbers"):
        write(folder, tmp_path / "new", records=[record])
    assert not (tmp_path / "new").exists()


def test_an_unknown_protein_stops_before_the_work(folder, tmp_path):
    seen = []
    with pytest.raises(UserError, match="--protein 'none' is not in the FASTA files"):
        write(folder, tmp_path / "new", protein="none", report=lambda *p: seen.append(p))
    assert seen == []
    assert not (tmp_path / "new").exists()
