"""``python -m studies.variants``: tables of measurements, scores, and the study on a few."""

import pytest

from performers.app.errors import UserError
from performers.proteins.scoring.variants import parse_variant
from studies.variants.__main__ import app
from studies.variants.assays import ASSAYS, Assay, proteins
from studies.variants.scores import blosum_scores, profile_scores
from tests.studies.study import run


def test_every_protein_has_an_assay():
    assert [protein.name for protein in proteins()] == list(ASSAYS)


def test_single_substitutions_are_read_and_numbered_from_one(tmp_path):
    lines = "\ufeffvariant,score\nK8A,1\nV9*,2\nV9V,3\nK8A,,\nK8C,\nT10G,-0.5\n"
    (tmp_path / "t.csv").write_text(lines, encoding="utf-8")
    variants, effects = Assay("t.csv", "variant", "score", 7).read(tmp_path, "MKVT")
    assert variants == [parse_variant("K2A"), parse_variant("T4G")]
    assert effects == [1, -0.5]
    (tmp_path / "t.tsv").write_text("variant\tscore\nM0A,K1A\t1\nK1A\t2\n")
    variants, _ = Assay("t.tsv", "variant", "score", 0).read(tmp_path, "MKVT")
    assert variants == [parse_variant("K2A")]


@pytest.mark.parametrize(
    ("file", "column", "message"),
    [
        ("absent.csv", "score", "cannot read"),
        ("t.csv", "effect", "no column 'effect'"),
        ("t.csv", "score", "expects K at position 3"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, file, column, message):
    (tmp_path / "t.csv").write_text("variant,score\nK9A,1\n")
    with pytest.raises(UserError, match=message):
        Assay(file, "variant", column, 7).read(tmp_path, "MKVT")


def test_residues_of_relatives_score_higher():
    variants = [parse_variant("K2R"), parse_variant("K2E")]
    protein = "MKVTAYIAKQRQISFVKSHFSRQ"
    seen, unseen = profile_scores(protein, [protein.replace("MK", "ME")], variants)[::-1]
    assert seen > unseen
    assert blosum_scores(variants) == [2, 1]


def test_the_study(tmp_path):
    name = "PABP_YEAST"
    assay = ASSAYS[name]
    (protein,) = (x for x in proteins() if x.name == name)
    (tmp_path / assay.file).write_text(
        f"{assay.variant},{assay.effect}\nG126A,0.1\nG126C,-1\nI128E,-3\nF129Y,-0.2\n"
    )
    relatives = tmp_path / "relatives.fasta"
    changed = protein.sequence.replace("GNIF", "ANIY")
    relatives.write_text(f">a family={name}\n{changed}\n>copy family={name}\nM{protein.sequence}\n")
    arguments = ["--assays", tmp_path, "--only", name, "--relatives", relatives]
    content, _ = run(app, tmp_path / "out", *arguments, "--counts", "1,5")
    part = content["parts"][name]
    assert part["variants"] == 4
    assert part["relatives"] == 1
    assert len(part["correlations"]) == 7
