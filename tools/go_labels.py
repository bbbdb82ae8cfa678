"""Write labels of proteins, from the Gene Ontology, for ``performers probe --labels``.

Usage:
    apt-get download metastudent-data && dpkg-deb -x metastudent-data_*.deb unpacked
    python tools/go_labels.py unpacked/usr/share/metastudent-data --output labels.tsv

Debian's metastudent-data holds three ontologies (`MFO` molecular function, `BPO` biological
process, `CCO` cellular component). All fields are separated by tabs:

- `<ontology>/goasp_annot.dat`, one protein a line: its UniProt accession, then the terms it was
  annotated with, one for each piece of evidence, so that a term may repeat.
- `fullTransitiveClosureGO.txt`: term, relation, ancestor, steps of `is_a` between them.
- `nameMapping.txt`: term, its name.

Many of these annotations were themselves inferred from sequence similarity, and a term that is
missing was more often never looked for than found absent.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from performers.app.errors import UserError
from performers.app.files import prepare_output_file, read_lines, write_atomically

ROOTS = {"MFO": "GO:0003674", "BPO": "GO:0008150", "CCO": "GO:0005575"}
"""The ontologies of metastudent-data and the term at the top of each."""

ENZYME_CLASSES = {
    "GO:0016491": "EC1-oxidoreductase",
    "GO:0016740": "EC2-transferase",
    "GO:0016787": "EC3-hydrolase",
    "GO:0016829": "EC4-lyase",
    "GO:0016853": "EC5-isomerase",
    "GO:0016874": "EC6-ligase",
}
"""The terms under catalytic activity that are the first six classes of enzymes, and our labels."""

PRESETS = ("frequent", "enzyme-class", "enzyme-class-7")
"""What `terms` may be besides a list of terms; see `go_labels`."""

_TERM = re.compile(r"GO:\d{7}")
_CATALYTIC = "GO:0003824"
_NOT_AN_ENZYME = "not-an-enzyme"
# Two terms whose proteins overlap more (shared / either) ask nearly the same question.
_SAME = 0.9


@dataclass(frozen=True)
class GoLabels:
    """Labels of proteins.

    Attributes:
        labels: Protein to its labels, in the order of the annotations; none for a protein that is
            annotated, but with no term that was chosen.
        names: Label to what it means, most frequent label first.
        counts: Label to the number of proteins that have it.
        left_out: Reason to the number of annotated proteins that got no entry for it.
    """

    labels: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]
    counts: Mapping[str, int]
    left_out: Mapping[str, int]


def go_labels(
    source: Path,
    ontology: str = "MFO",
    *,
    terms: str = "frequent",
    min_depth: int = 2,
    min_count: int = 500,
    max_terms: int = 30,
) -> GoLabels:
    """Labels proteins with terms of the Gene Ontology, propagated to ancestors.

    A protein with a term has all of the term's ancestors. Proteins that nothing below the root is
    known of are left out. Without enzyme classes a protein may have any number of labels, and one
    with none is a negative example of all. With them it has exactly one.

    Args:
        source: Folder of metastudent-data; see `metastudent_dataset`.
        ontology: One of `ROOTS`.
        terms: Terms with commas between, or one of

            - `"frequent"`: the `max_terms` terms with most proteins, of those at least `min_depth`
              steps below the root that `min_count` proteins have, leaving out a term whose
              proteins are nearly those of a chosen one (shared over either above 0.9);
            - `"enzyme-class"`: the class of an enzyme, EC 1 to 6; proteins with none or several
              are left out;
            - `"enzyme-class-7"`: the same, and a seventh label for proteins without any catalytic
              activity among their terms.
        min_depth: For `"frequent"`.
        min_count: For `"frequent"`.
        max_terms: For `"frequent"`.

    Raises:
        UserError: A file is missing or not of its format, an argument is out of range, a term is
            unknown, or nothing fits.
    """
    if ontology not in ROOTS:
        raise UserError(f"--ontology must be one of {', '.join(ROOTS)}, got {ontology!r}")
    enzymes = terms in ("enzyme-class", "enzyme-class-7")
    if enzymes and ontology != "MFO":
        raise UserError(f"--terms {terms} needs --ontology MFO, got {ontology}")
    root, folder = ROOTS[ontology], metastudent_dataset(source)
    annotations = read_go_annotations(folder / ontology / "goasp_annot.dat")
    ancestors = read_go_ancestors(folder / "fullTransitiveClosureGO.txt")
    informed: dict[str, frozenset[str]] = {}
    # Many proteins share their terms: each set is propagated once.
    propagated: dict[frozenset[str], frozenset[str]] = {}
    for name, known in annotations.items():
        if known not in propagated:
            every = known.union(*(ancestors.get(term, ()) for term in known))
            propagated[known] = every - {root} if root in every else frozenset()
        if propagated[known]:
            informed[name] = propagated[known]
    left_out = {"nothing known below the root": len(annotations) - len(informed)}
    if enzymes:
        return _enzyme_labels(informed, left_out, seventh=terms == "enzyme-class-7")
    counts = Counter(chain.from_iterable(informed.values()))
    if terms == "frequent":
        for option, value in (
            ("--min-depth", min_depth),
            ("--min-count", min_count),
            ("--max-terms", max_terms),
        ):
            if value < 1:
                raise UserError(f"{option} must be at least 1, got {value}")
        deep = [x for x in counts if ancestors.get(x, {}).get(root, 0) >= min_depth]
        frequent = [term for term in deep if counts[term] >= min_count]
        if not frequent:
            raise UserError(
                f"no GO term {min_depth} or more steps below the root has {min_count} proteins; "
                "lower --min-count or --min-depth"
            )
        frequent.sort(key=lambda term: (-counts[term], term))
        chosen = _distinct(frequent, Counter(informed.values()), max_terms)
    else:
        given = [term.strip() for term in terms.split(",")]
        if unknown := [term for term in given if term not in counts]:
            raise UserError(
                f"--terms: no protein has {unknown[0]!r} in {ontology}; give GO terms with commas "
                f"between, or one of {', '.join(PRESETS)}"
            )
        chosen = sorted(set(given), key=lambda term: (-counts[term], term))
    names = read_term_names(folder / "nameMapping.txt")
    return GoLabels(
        {name: tuple(x for x in chosen if x in known) for name, known in informed.items()},
        {term: names.get(term, term) for term in chosen},
        {term: counts[term] for term in chosen},
        left_out,
    )


def read_go_annotations(path: Path) -> dict[str, frozenset[str]]:
    """Accessions of `goasp_annot.dat`, each with the distinct terms it was annotated with.

    Raises:
        UserError: The file is missing, empty or not of this format.
    """
    annotations: dict[str, frozenset[str]] = {}
    for number, fields in _rows(path):
        name, *terms = fields
        bad = [term for term in terms if not _TERM.fullmatch(term)]
        if not name or not terms or bad:
            got = f"the term {bad[0]!r}" if bad else f"{len(fields)} field(s)"
            raise UserError(
                f"{path}:{number}: expected an accession and GO terms with tabs between, got {got}"
            )
        annotations[name] = annotations.get(name, frozenset()).union(map(sys.intern, terms))
    if not annotations:
        raise UserError(f"{path} is empty; expected an accession and its GO terms in each line")
    return annotations


def read_go_ancestors(path: Path) -> dict[str, dict[str, int]]:
    """Terms of `fullTransitiveClosureGO.txt`, each with its ancestors and the fewest steps to them.

    Raises:
        UserError: The file is missing, empty or not of this format.
    """
    ancestors: dict[str, dict[str, int]] = {}
    for number, fields in _rows(path):
        if len(fields) != 4 or not fields[3].isdigit():
            raise UserError(
                f"{path}:{number}: expected term, relation, ancestor and steps with tabs between, "
                f"got {len(fields)} fields: {' '.join(fields)[:60]!r}"
            )
        above, ancestor = ancestors.setdefault(fields[0], {}), sys.intern(fields[2])
        above[ancestor] = min(int(fields[3]), above.get(ancestor, int(fields[3])))
    if not ancestors:
        raise UserError(f"{path} is empty; expected the transitive closure of the Gene Ontology")
    return ancestors


def metastudent_dataset(folder: Path) -> Path:
    """The newest data set in the folder of metastudent-data, or the folder if it is one itself.

    Raises:
        UserError: The folder holds no data set.
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
    """Names of terms in `nameMapping.txt`; none when there is no such file."""
    if not path.is_file():
        return {}
    return {fields[0]: " ".join(fields[1].split()) for _, fields in _rows(path) if len(fields) == 2}


def _enzyme_labels(
    informed: Mapping[str, frozenset[str]], left_out: dict[str, int], *, seventh: bool
) -> GoLabels:
    several, others = "several enzyme classes", "none of the enzyme classes"
    left_out = {**left_out, several: 0, others: 0}
    labels: dict[str, tuple[str, ...]] = {}
    for name, known in informed.items():
        classes = [label for term, label in ENZYME_CLASSES.items() if term in known]
        if len(classes) == 1:
            labels[name] = (classes[0],)
        elif len(classes) > 1:
            left_out[several] += 1
        elif seventh and _CATALYTIC not in known:
            labels[name] = (_NOT_AN_ENZYME,)
        else:
            left_out[others] += 1
    counts = Counter(label for (label,) in labels.values())
    if len(counts) < 2:
        raise UserError(
            f"--terms: the annotations have {len(counts)} enzyme class(es); at least two are needed"
        )
    order = [label for label, _ in counts.most_common()]
    return GoLabels(labels, {label: label for label in order}, dict(counts), left_out)


def _distinct(eligible: Sequence[str], sets: Mapping[frozenset[str], int], most: int) -> list[str]:
    """The first `most` terms whose proteins are not nearly those of one before.

    `sets` are the sets of terms that proteins have, and the number of proteins that have each.
    """
    proteins = np.array(list(sets.values()))
    chosen: dict[str, np.ndarray] = {}
    for term in eligible:
        held = np.array([term in known for known in sets])
        overlaps = (proteins[held & o].sum() / proteins[held | o].sum() for o in chosen.values())
        if all(overlap <= _SAME for overlap in overlaps):
            chosen[term] = held
        if len(chosen) == most:
            break
    return list(chosen)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of each line that is not blank, and its fields."""
    return ((number, line.split("\t")) for number, line in read_lines(path))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of metastudent-data")
    parser.add_argument("--output", type=Path, required=True, help="a .tsv file")
    parser.add_argument("--ontology", default="MFO", help=", ".join(ROOTS))
    parser.add_argument(
        "--terms",
        default="frequent",
        help=f"one of {', '.join(PRESETS)}, or GO terms with commas between",
    )
    parser.add_argument(
        "--min-depth", type=int, default=2, help="least steps of frequent terms below the root"
    )
    parser.add_argument(
        "--min-count", type=int, default=500, help="least proteins of a frequent term"
    )
    parser.add_argument("--max-terms", type=int, default=30, help="most frequent terms")
    options = vars(parser.parse_args(arguments))
    try:
        output = prepare_output_file(options.pop("output"), (".tsv",))
        found = go_labels(**options)
    except UserError as error:
        sys.exit(f"go_labels: {error}")
    lines = [f"# {label}\t{name}" for label, name in found.names.items()]
    lines += [f"{name}\t{','.join(labels)}" for name, labels in found.labels.items()]
    write_atomically(output, ("\n".join(lines) + "\n").encode())
    for reason, count in found.left_out.items():
        print(f"{count:,} proteins left out: {reason}", file=sys.stderr)
    for label, name in found.names.items():
        print(f"{label}\t{name}\t{found.counts[label]}")
    print(f"{len(found.labels):,} proteins in {output}")


if __name__ == "__main__":
    main()
