"""``performers score --variants``."""

import pytest

from performers.cli import variants
from performers.proteins import load
from tests.cli.commands import refusal, run
from tests.proteins.runs import make_model_folder

PROTEINS = {"sp|P1|ONE": "MKTAYIAK", "b": "MKW"}
LINES = ["P1\tA4V", "b\tW3G", "P1\tA4V:K8R", "sp|P1|ONE\tM1A", "P1\tI6L"]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "p.fasta"
    path.write_text("".join(f">{name} x\n{letters}\n" for name, letters in PROTEINS.items()))
    return path


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "v.tsv"
    path.write_text("protein\tvariant\n" + "\n\n".join(LINES) + "\n")
    return path


@pytest.mark.parametrize("with_relatives", [False, True])
def test_variants_in_the_order_of_the_table(
    masked, fasta, table, tmp_path, with_relatives, monkeypatch
):
    monkeypatch.setattr(variants, "_AT_ONCE", 2)
    options, columns = [], ["name", "variant", "log_odds"]
    model, relatives = load(masked), None
    if with_relatives:
        path = tmp_path / "r.fasta"
        path.write_text(">r\nMRTAYLAK\n")
        options, relatives = ["--relatives", path], model.relatives(["MRTAYLAK"])
        columns.append("log_odds_with_relatives")
    arguments = ["score", masked, fasta, "--variants", table, *options]
    out, lines = run(*arguments)
    assert lines[-1] == "5 variants of 3 proteins"
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == columns
    assert ["\t".join(row[:2]) for row in rows[1:]] == LINES
    letters = {"P1": "MKTAYIAK", **PROTEINS}
    for row in rows[1:]:
        for value, read in zip(row[2:], (None, relatives), strict=False):
            (expected,) = model.score_variants(letters[row[0]], [row[1]], relatives=read)
            assert float(value) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    output = tmp_path / "out.tsv"
    assert run(*arguments, "--output", output)[0] == ""
    assert output.read_text() == out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\tvariant\n", "holds no variant"),
        ("P1\tA4V\nP1 A4V\n", ":2: expected the name of a protein and a variant"),
        ("P1\tA4V\nP2\tA4V\n", ":2: 'P2' is no protein of the FASTA files"),
        ("P1\tA4V\n\nP1\tG4V\n", ":3: G4V expects G at position 4, where the protein has A; "),
        ("P1\tA4V\t0.3\n", ":1: expected the name of a protein and a variant"),
        ("P1\tA4\n", ":1: 'A4' is not a variant; write substitutions as A123V"),
    ],
)
def test_tables_that_cannot_be_used(masked, fasta, table, tmp_path, text, message):
    table.write_text(text)
    output = tmp_path / "out.tsv"
    line = refusal("score", masked, fasta, "--variants", table, "--output", output)
    assert message in line
    assert str(table) in line
    assert not output.exists()


def test_what_does_not_go_together(masked, fasta, table, tmp_path):
    arguments = ["score", masked, fasta, "--variants", table]
    for flag in ("--residues", "--substitutions"):
        assert f"{flag} cannot be combined with --variants" in refusal(
            *arguments, flag, tmp_path / "x.tsv"
        )
    assert ".tsv" in refusal(*arguments, "--output", tmp_path / "x.json")
    fasta.write_text(fasta.read_text() + ">P1\nMK\n")
    assert "'P1' is the name of several proteins" in refusal(*arguments)


def test_proteins_that_are_not_named_are_not_read(tmp_path, table):
    """Learned positions end before the long one does."""
    model = make_model_folder(tmp_path / "m", position_embedding="learned")
    fasta = tmp_path / "p.fasta"
    fasta.write_text(">long\n" + "MK" * 500 + "\n>P1\nMKTAYIAK\n")
    table.write_text("P1\tA4V\n")
    value = float(run("score", model, fasta, "--variants", table)[0].split()[-1])
    (expected,) = load(model).score_variants("MKTAYIAK", ["A4V"])
    assert value == pytest.approx(expected, rel=1e-3)
    table.write_text("long\tM1V\n")
    assert "cannot read 1002" in refusal("score", model, fasta, "--variants", table)
