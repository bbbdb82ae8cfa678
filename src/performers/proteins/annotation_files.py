"""The files of Debian's metastudent-data: proteins' terms of the Gene Ontology, and its graph.

The package holds three ontologies (`MFO` molecular function, `BPO` biological process, `CCO`
cellular component). All fields are separated by tabs:

- `<ontology>/goasp_annot.dat`, one protein a line: its UniProt accession, then the terms it was
  annotated with, one for each piece of evidence, so that a term may repeat.
- `fullTransitiveClosureGO.txt`: term, relation, ancestor, steps of `is_a` between them.
- `nameMapping.txt`: term, its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from performers.app.errors import UserError

_TERM = re.compile(r"GO:\d{7}")


def read_go_annotations(path: Path) -> dict[str, frozenset[str]]:
    """Reads `goasp_annot.dat`.

    Args:
        path: The file.

    Returns:
        Accession to the distinct terms it was annotated with.

    Raises:
        UserError: The file is missing, empty or not of this format.
    """
    annotations: dict[str, frozenset[str]] = {}
    shared: dict[str, str] = {}
    for number, fields in _rows(path):
        name, *terms = fields
        bad = [term for term in terms if not _TERM.fullmatch(term)]
        if not name or not terms or bad:
            got = f"the term {bad[0]!r}" if bad else f"{len(fields)} field(s)"
            raise UserError(
                f"{path}:{number}: expected an accession and GO terms with tabs between, got {got}"
            )
        known = frozenset(shared.setdefault(term, term) for term in terms)
        annotations[name] = annotations.get(name, frozenset()) | known
    if not annotations:
        raise UserError(f"{path} is empty; expected an accession and its GO terms in each line")
    return annotations


def read_go_ancestors(path: Path) -> dict[str, dict[str, int]]:
    """Reads `fullTransitiveClosureGO.txt`.

    Args:
        path: The file.

    Returns:
        Term to its ancestors, each with the fewest steps to it.

    Raises:
        UserError: The file is missing, empty or not of this format.
    """
    ancestors: dict[str, dict[str, int]] = {}
    shared: dict[str, str] = {}
    for number, fields in _rows(path):
        if len(fields) != 4 or not fields[3].isdigit():
            raise UserError(
                f"{path}:{number}: expected term, relation, ancestor and steps with tabs between, "
                f"got {len(fields)} fields: {' '.join(fields)[:60]!r}"
            )
        term, ancestor = (shared.setdefault(name, name) for name in (fields[0], fields[2]))
        above = ancestors.setdefault(term, {})
        above[ancestor] = min(int(fields[3]), above.get(ancestor, int(fields[3])))
    if not ancestors:
        raise UserError(f"{path} is empty; expected the transitive closure of the Gene Ontology")
    return ancestors


def metastudent_dataset(folder: Path) -> Path:
    """Finds the data in the folder of metastudent-data.

    Args:
        folder: The package's folder, or one of the `dataset_*` folders in it.

    Returns:
        The folder of the newest data set.

    Raises:
        UserError: There is none.
    """
    if (folder / "fullTransitiveClosureGO.txt").is_file():
        return folder
    inside = sorted(folder.glob("dataset_*/fullTransitiveClosureGO.txt"))
    if not inside:
        raise UserError(
            f"{folder} holds no dataset_*/fullTransitiveClosureGO.txt; give the folder that "
            "Debian's metastudent-data installs, /usr/share/metastudent-data"
        )
    return inside[-1].parent


def read_term_names(path: Path) -> dict[str, str]:
    """Reads `nameMapping.txt`.

    Args:
        path: The file.

    Returns:
        Term to its name; nothing when there is no such file.
    """
    if not path.is_file():
        return {}
    return {fields[0]: " ".join(fields[1].split()) for _, fields in _rows(path) if len(fields) == 2}


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of each line that is not blank, and its fields."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n").split("\t")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder of metastudent-data") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; copy the file again") from None
