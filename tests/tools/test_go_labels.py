"""GO terms as labels, from files in the formats of metastudent-data."""

import pytest

from performers.app.errors import UserError
from performers.proteins.probe.labels import read_labels
from tools.go_labels import (
    ENZYME_CLASSES,
    go_labels,
    main,
    metastudent_dataset,
    read_go_ancestors,
    read_go_annotations,
    write_go_labels,
)

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


def labels_of(metastudent, **options):
    folder = metastudent_dataset(metastudent)
    return go_labels(
        read_go_annotations(folder / "MFO" / "goasp_annot.dat"),
        read_go_ancestors(folder / "fullTransitiveClosureGO.txt"),
        **options,
    )


def test_terms_are_propagated_to_their_ancestors(metastudent):
    found = labels_of(metastudent, terms=[TRANSFERASE, NUCLEIC])
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
    found = labels_of(metastudent, min_count=1)
    # Binding and catalytic activity are one step below the root.
    assert list(found.counts) == [NUCLEIC, HYDROLASE, DNA, TRANSFERASE, KINASE]
    assert list(labels_of(metastudent, min_count=3).counts) == [NUCLEIC, HYDROLASE]
    assert list(labels_of(metastudent, min_count=1, min_depth=3).counts) == [DNA, KINASE]
    assert list(labels_of(metastudent, min_count=1, max_terms=2).counts) == [NUCLEIC, HYDROLASE]
    shallow = labels_of(metastudent, min_count=1, min_depth=1)
    # All that binds binds nucleic acids: the same question, so the second term is dropped.
    assert list(shallow.counts) == [CATALYTIC, NUCLEIC, HYDROLASE, DNA, TRANSFERASE, KINASE]


def test_enzymes_have_one_class(metastudent):
    found = labels_of(metastudent, terms="enzyme-class")
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
    seven = labels_of(metastudent, terms="enzyme-class-7")
    assert seven.labels["P3"] == seven.labels["P8"] == ("not-an-enzyme",)
    # Catalytic activity of an unknown class is neither.
    assert "P7" not in seven.labels
    assert len(ENZYME_CLASSES) == 6


@pytest.mark.parametrize("inside", [False, True])
def test_the_table_is_what_probes_read(metastudent, tmp_path, inside):
    folder = metastudent / "dataset_201401" if inside else metastudent
    path = tmp_path / "new" / "labels.tsv"
    written = write_go_labels(folder, path, "MFO", terms=f"{DNA}, {KINASE}")
    read = read_labels(path)
    assert read.labels == written.labels
    assert read.names == {DNA: "DNA binding", KINASE: "kinase activity"}
    assert read.groups == {}


def test_bad_files_and_arguments_are_named(metastudent, tmp_path):
    for options, message in (
        ({"ontology": "XFO"}, "--ontology must be one of MFO, BPO, CCO"),
        ({"terms": "GO:9999999"}, "no protein has 'GO:9999999' in MFO"),
        ({"terms": []}, "--terms is empty"),
        ({"terms": "enzyme-class", "ontology": "BPO"}, "needs --ontology MFO"),
        ({"min_count": 99}, "no GO term 2 or more steps"),
        ({"min_depth": 0}, "--min-depth must be"),
        ({"min_count": 1, "max_terms": 0}, "--max-terms must be"),
    ):
        with pytest.raises(UserError, match=message):
            labels_of(metastudent, **options)
    with pytest.raises(UserError, match="holds no dataset_"):
        write_go_labels(tmp_path, tmp_path / "x.tsv")
    with pytest.raises(UserError, match=r"goasp_annot\.dat does not exist"):
        write_go_labels(metastudent, tmp_path / "x.tsv", "CCO")
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


def test_the_script_writes_the_table_and_prints_it(metastudent, tmp_path, capsys):
    path = tmp_path / "labels.tsv"
    main([str(metastudent), "--output", str(path), "--terms", "enzyme-class"])
    out, err = capsys.readouterr()
    written = path.read_bytes()
    found = write_go_labels(metastudent, path, terms="enzyme-class")
    assert path.read_bytes() == written
    assert out.splitlines() == [
        *(f"{label}\t{label}\t{found.counts[label]}" for label in found.names),
        f"{len(found.labels)} proteins in {path}",
    ]
    assert "1 proteins left out: several enzyme classes" in err
    for output, ontology, words in (
        (path, "XFO", "go_labels: --ontology must be one of"),
        (tmp_path / "labels.csv", "MFO", r"must end with \.tsv"),
    ):
        with pytest.raises(SystemExit, match=words):
            main([str(metastudent), "--output", str(output), "--ontology", ontology])
