"""GO terms as labels, from files in the formats of metastudent-data."""

import pytest

from performers.app.errors import UserError
from performers.proteins.probe.labels import read_labels
from tools.go_labels import go_labels, main, read_go_ancestors, read_go_annotations

ROOT, CATALYTIC, BINDING = "GO:0003674", "GO:0003824", "GO:0005488"
HYDROLASE, TRANSFERASE, KINASE, DNA, NUCLEIC = (
    "GO:0016787",
    "GO:0016740",
    "GO:0016301",
    "GO:0003677",
    "GO:0003676",
)
PARENTS = {
    CATALYTIC: ROOT,
    BINDING: ROOT,
    HYDROLASE: CATALYTIC,
    TRANSFERASE: CATALYTIC,
    KINASE: TRANSFERASE,
    NUCLEIC: BINDING,
    DNA: NUCLEIC,
}
ANNOTATIONS = {
    "P1": [KINASE, KINASE],
    "P2": [HYDROLASE],
    "P3": [DNA],
    "P4": [DNA, HYDROLASE],
    "P5": [ROOT],
    "P6": [TRANSFERASE, HYDROLASE],
    "P7": [CATALYTIC],
    "P8": [NUCLEIC],
}


def closure():
    for term in PARENTS:
        above, steps = PARENTS.get(term), 1
        while above:
            yield f"{term}\tOBO_REL:is_a\t{above}\t{steps}\n"
            above, steps = PARENTS.get(above), steps + 1


@pytest.fixture
def metastudent(tmp_path):
    folder = tmp_path / "metastudent-data" / "dataset_201401"
    (folder / "MFO").mkdir(parents=True)
    lines = (f"{name}\t" + "\t".join(terms) + "\n" for name, terms in ANNOTATIONS.items())
    (folder / "MFO" / "goasp_annot.dat").write_text("".join(lines))
    (folder / "fullTransitiveClosureGO.txt").write_text("".join(closure()))
    (folder / "nameMapping.txt").write_text(f"{DNA}\tDNA binding\n{KINASE}\tkinase activity\n")
    return folder.parent


def test_terms_are_propagated_to_their_ancestors(metastudent):
    found = go_labels(metastudent, terms=f"{TRANSFERASE}, {NUCLEIC}")
    assert found.labels == {
        "P1": (TRANSFERASE,),
        "P2": (),
        "P3": (NUCLEIC,),
        "P4": (NUCLEIC,),
        "P6": (TRANSFERASE,),
        "P7": (),
        "P8": (NUCLEIC,),
    }
    assert found.counts == {NUCLEIC: 3, TRANSFERASE: 2}
    assert found.left_out == {"nothing known below the root": 1}


def test_frequent_terms_are_deep_enough_and_differ(metastudent):
    found = go_labels(metastudent, min_count=1)
    # Binding and catalytic activity are one step below the root.
    assert list(found.counts) == [NUCLEIC, HYDROLASE, DNA, TRANSFERASE, KINASE]
    assert list(go_labels(metastudent, min_count=3).counts) == [NUCLEIC, HYDROLASE]
    assert list(go_labels(metastudent, min_count=1, min_depth=3).counts) == [DNA, KINASE]
    assert list(go_labels(metastudent, min_count=1, max_terms=2).counts) == [NUCLEIC, HYDROLASE]
    shallow = go_labels(metastudent, min_count=1, min_depth=1)
    # All that binds binds nucleic acids: the same question, so the second term is dropped.
    assert list(shallow.counts) == [CATALYTIC, NUCLEIC, HYDROLASE, DNA, TRANSFERASE, KINASE]


def test_enzymes_have_one_class(metastudent):
    found = go_labels(metastudent, terms="enzyme-class")
    assert found.labels == {
        "P1": ("EC2-transferase",),
        "P2": ("EC3-hydrolase",),
        "P4": ("EC3-hydrolase",),
    }
    assert found.left_out == {
        "nothing known below the root": 1,
        "several enzyme classes": 1,
        "none of the enzyme classes": 3,
    }
    seven = go_labels(metastudent, terms="enzyme-class-7")
    assert seven.labels["P3"] == seven.labels["P8"] == ("not-an-enzyme",)
    # Catalytic activity of an unknown class is neither.
    assert "P7" not in seven.labels


def test_bad_files_and_arguments_are_named(metastudent, tmp_path):
    for options, message in (
        ({"ontology": "XFO"}, "--ontology must be one of MFO, BPO, CCO"),
        ({"terms": "GO:9999999"}, "no protein has 'GO:9999999' in MFO"),
        ({"terms": f"{DNA},"}, "no protein has '' in MFO"),
        ({"terms": "enzyme-class", "ontology": "BPO"}, "needs --ontology MFO"),
        ({"min_count": 99}, "no GO term 2 or more steps"),
        ({"min_depth": 0}, "--min-depth must be"),
        ({"min_count": 1, "max_terms": 0}, "--max-terms must be"),
    ):
        with pytest.raises(UserError, match=message):
            go_labels(metastudent, **options)
    with pytest.raises(UserError, match="holds no dataset_"):
        go_labels(tmp_path)
    with pytest.raises(UserError, match=r"goasp_annot\.dat does not exist"):
        go_labels(metastudent, "CCO")
    bad = tmp_path / "bad"
    for reader, text, message in (
        (read_go_annotations, "P1\tGO:0003677\nP2\n", r"bad:2: expected an accession .* 1 field"),
        (read_go_annotations, "P1\tGO:3\n", r"bad:1: .* the term 'GO:3'"),
        (read_go_annotations, "", "is empty"),
        (read_go_ancestors, "a\tb\tc\n", r"bad:1: expected term, relation"),
        (read_go_ancestors, "a\tb\tc\td\n", r"bad:1: expected term, relation"),
        (read_go_ancestors, "", "is empty"),
    ):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            reader(bad)


@pytest.mark.parametrize("inside", [False, True])
def test_the_table_is_what_probes_read(metastudent, tmp_path, capsys, inside):
    folder = metastudent / "dataset_201401" if inside else metastudent
    path = tmp_path / "new" / "labels.tsv"
    main([str(folder), "--output", str(path), "--terms", f"{DNA}, {KINASE}"])
    out, err = capsys.readouterr()
    read = read_labels(path)
    assert read.labels == go_labels(folder, terms=f"{DNA}, {KINASE}").labels
    assert read.names == {DNA: "DNA binding", KINASE: "kinase activity"}
    assert read.groups == {}
    assert out.splitlines() == [
        f"{DNA}\tDNA binding\t2", f"{KINASE}\tkinase activity\t1", f"7 proteins in {path}",
    ]  # fmt: skip
    assert err == "1 proteins left out: nothing known below the root\n"


def test_the_script_refuses(metastudent, tmp_path):
    for output, ontology, words in (
        (tmp_path / "labels.tsv", "XFO", "go_labels: --ontology must be one of"),
        (tmp_path / "labels.csv", "MFO", r"must end with \.tsv"),
    ):
        with pytest.raises(SystemExit, match=words):
            main([str(metastudent), "--output", str(output), "--ontology", ontology])
