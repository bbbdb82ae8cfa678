"""Tables of proteins' labels, and of the clusters of related sequences that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from performers.app.errors import UserError
from performers.app.files import read_lines


@dataclass(frozen=True)
class ProteinLabels:
    """A table of labels.

    Attributes:
        labels: Protein to its labels, none for a protein that has none of them.
        groups: Protein to its group, where the table has a third column.
        names: Label to what it means, from lines `# label<TAB>name`.
        source: The file, for messages.
        lines: Protein to the number of its line.
    """

    labels: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, str]
    names: Mapping[str, str]
    source: str = "the FASTA headers"
    lines: Mapping[str, int] = field(default_factory=dict)

    def place(self, protein: str) -> str:
        """File and line of a protein."""
        return f"{self.source}:{self.lines[protein]}" if protein in self.lines else self.source


def read_labels(path: Path) -> ProteinLabels:
    """Read a table of labels.

    Args:
        path: Text in UTF-8, a protein a line: name, labels with commas between (may be empty),
            group (may be left out), with tabs between. Lines that start with `#` are remarks; one
            with a tab names a label. A first line `name<TAB>labels` is a heading.

    Returns:
        The labels.

    Raises:
        UserError: The file is missing, empty, not of this format, or names a protein twice.
    """
    labels: dict[str, tuple[str, ...]] = {}
    groups: dict[str, str] = {}
    names: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in read_lines(path):
        if line.startswith("#"):
            label, tab, meaning = line.removeprefix("#").strip().partition("\t")
            if tab:
                names[label.strip()] = meaning.strip()
            continue
        fields = [field.strip() for field in line.split("\t")]
        if not labels and fields[0].lower() == "name" and fields[1:2] in (["label"], ["labels"]):
            continue
        if len(fields) not in (2, 3) or not fields[0] or (len(fields) == 3 and not fields[2]):
            raise UserError(
                f"{path}:{number}: expected a name, labels with commas between and perhaps a "
                f"group, with tabs between; got {line[:60]!r}"
            )
        if fields[0] in labels:
            raise UserError(
                f"{path}:{number}: {fields[0]!r} is in an earlier line already; write all its "
                "labels in one, with commas between"
            )
        given = (label.strip() for label in fields[1].split(","))
        lines[fields[0]] = number
        labels[fields[0]] = tuple(dict.fromkeys(label for label in given if label))
        if len(fields) == 3:
            groups[fields[0]] = fields[2]
    if not any(labels.values()):
        raise UserError(f"{path} holds no label; expected lines of name, tab, labels")
    return ProteinLabels(labels, groups, names, str(path), lines)


def read_groups(path: Path) -> dict[str, str]:
    """Read clusters as mmseqs2 writes them.

    Args:
        path: `*_cluster.tsv`: representative, tab, member; a line for each member.

    Returns:
        Member to representative.

    Raises:
        UserError: The file is missing, empty, not of this format, or puts a protein into two
            clusters.
    """
    groups: dict[str, str] = {}
    for number, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != 2 or not all(field.strip() for field in fields):
            raise UserError(
                f"{path}:{number}: expected the representative of a cluster and a member with a "
                f"tab between, as in the *_cluster.tsv of mmseqs2; got {line[:60]!r}"
            )
        representative, member = (field.strip() for field in fields)
        if groups.setdefault(member, representative) != representative:
            raise UserError(
                f"{path}:{number}: {member!r} is in the cluster of {groups[member]!r} already; "
                "each protein has one cluster (the first column is the cluster, the second its "
                "member)"
            )
    if not groups:
        raise UserError(f"{path} is empty; expected the *_cluster.tsv of mmseqs2")
    return groups
