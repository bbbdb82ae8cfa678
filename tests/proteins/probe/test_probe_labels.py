"""Labels and groups of proteins, from tables and from headers."""

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.probe.labels import read_groups, read_labels
from performers.proteins.probe.task import build_task


def record(name, description="", sequence="MKV"):
    return ProteinRecord(name, description, sequence)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


RECORDS = [
    record(name, "", letters)
    for name, letters in zip("abcd", ("MK", "MV", "MA", "MC"), strict=True)
]


def test_a_table_of_labels(tmp_path):
    path = write(
        tmp_path / "x.tsv",
        "# made by hand\n# GO:1\tbinding\nname\tlabels\tgroup\na\tGO:1, GO:2,GO:1\tx\r\n\nb\t\ty\n",
    )
    found = read_labels(path)
    assert found.labels == {"a": ("GO:1", "GO:2"), "b": ()}
    assert found.groups == {"a": "x", "b": "y"}
    assert found.names == {"GO:1": "binding"}


def test_headers_carry_labels_and_groups():
    task = build_task(
        [
            record("a", "kinase labels=x,y family=f1", "MK"),
            record("b", "labels=x group=f2 family=f1", "MV"),
            record("c", "family=f1 labels=,", "MA"),
        ]
    )
    assert task.labels == ("x", "y")
    assert task.targets.tolist() == [[True, True], [True, False], [False, False]]
    assert task.groups.tolist() == [0, 1, 0]
    assert not task.multiclass


def test_accessions_of_uniprot_headers_are_looked_up(tmp_path):
    labels = read_labels(write(tmp_path / "l.tsv", "P1\tx\nP2\ty\nP3\ty\n"))
    names = ["sp|P1|ONE_HUMAN", "tr|P2|TWO_HUMAN", "P3"]
    records = [record(name, "", f"M{letter}") for name, letter in zip(names, "KVA", strict=True)]
    task = build_task(records, labels=labels, groups={"P1": "g", "P2": "h", "P3": "h"})
    assert task.multiclass
    assert task.labels == ("y", "x")
    assert task.groups.tolist() == [0, 1, 1]


def test_what_is_left_out_is_counted(tmp_path):
    labels = read_labels(write(tmp_path / "l.tsv", "a\tx\nb\ty\nc\tx\nz\tx\n"))
    records = [*RECORDS, record("a"), record("e")]
    task = build_task(records, labels=labels, groups={"a": "1", "b": "2"})
    assert task.proteins == ("a", "b")
    assert set(task.notes) == {
        "1 repeats of a name left out",
        "2 proteins without labels left out",
        "1 labelled proteins without a group left out",
    }
    task = build_task(records, labels=labels, grouped=False, max_residues=1)
    assert task.groups.tolist() == [0, 1, 2]
    assert task.sequences == ("M", "M", "M")
    assert "3 sequences cropped to 1 residues" in task.notes


def test_large_groups_can_be_thinned():
    sizes = {"f1": 9, "f2": 2, "f3": 1}
    records = [
        record(f"{family}-{n}", f"labels={n % 2} family={family}", "M" * (100 * size + n + 1))
        for family, size in sizes.items()
        for n in range(size)
    ]
    tasks = [build_task(records, max_per_group=2, seed=seed) for seed in range(6)]
    assert all(np.bincount(task.groups).tolist() == [2, 2, 1] for task in tasks)
    assert len({task.proteins for task in tasks}) > 1
    assert "7 proteins beyond those drawn of their group left out" in tasks[0].notes
    assert list(tasks[0].proteins) == [r.name for r in records if r.name in tasks[0].proteins]


def test_groups_that_share_a_sequence_are_one():
    records = [
        record(name, f"labels={label} family={family}", sequence)
        for name, label, family, sequence in (
            ("a", "x", "1", "MK"),
            ("b", "y", "2", "MK"),
            ("c", "x", "2", "MV"),
            ("d", "y", "3", "MV"),
            ("e", "y", "4", "MA"),
        )
    ]
    assert build_task(records).groups.tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_labels, b"a x\n", r"x\.tsv:1: expected a name, labels"),
        (read_labels, b"a\tx\nb\ty\tz\tw\n", r"x\.tsv:2: expected a name, labels"),
        (read_labels, b"a\tx\t\n", r"x\.tsv:1: expected"),
        (read_labels, b"a\tx\nb\ty\na\tz\n", r"x\.tsv:3: 'a' is in an earlier line"),
        (read_labels, b"", "holds no label"),
        (read_labels, b"a\t\n", "holds no label"),
        (read_labels, None, "does not exist"),
        (read_groups, b"a\ta\nb\ta\n", r"x\.tsv:2: 'a' is in the cluster of 'a' already"),
        (read_groups, b"a b\n", r"x\.tsv:1: expected the representative"),
        (read_groups, b"", "is empty"),
        (read_groups, None, "does not exist"),
        (read_groups, b"\xff\xfe\x00a", "not UTF-8"),
    ],
)
def test_odd_tables_are_refused(tmp_path, read, content, message):
    path = tmp_path / "x.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


NUMBERED = [record(f"p{n}", f"labels={n % 2} family={n}", "M" * (n + 1)) for n in range(40)]
LABELLED = [record("a", "labels=x"), record("b", "labels=y")]


def test_a_subset_is_drawn_by_the_seed(tmp_path):
    drawn = [build_task(NUMBERED, max_sequences=10, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].proteins == drawn[1].proteins != drawn[2].proteins
    assert len(drawn[0].proteins) == 10
    assert "30 proteins not drawn left out" in drawn[0].notes
    assert len(build_task(NUMBERED, grouped=False).proteins) == 40
    path = write(tmp_path / "x.tsv", "a\ta\na\tb\nc\tc\na\tb\n")
    assert read_groups(path) == {"a": "a", "b": "a", "c": "c"}


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (NUMBERED, {"grouped": False, "max_per_group": 1}, "--per-group has no use with --split r"),
        (NUMBERED, {"grouped": False, "groups": {"p0": "1"}}, "--groups has no use with --split r"),
        (RECORDS, {}, r"no labels=.*--labels"),
        (LABELLED, {}, r"mmseqs easy-cluster .*clusters\.tsv .*--split random"),
        (LABELLED, {"groups": {"q": "1"}}, r"none of the 2 proteins has both .*'a'.*'q'"),
        (LABELLED[:1], {"grouped": False}, r"1 label\(s\)"),
    ],
)
def test_what_cannot_be_asked_says_what_to_do(records, options, message):
    with pytest.raises(UserError, match=message):
        build_task(records, **options)
