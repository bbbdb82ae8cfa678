r"""Make the protein sequences that ship with the library, from Swiss-Prot.

Whole protein families go in, so that a small model can learn something in a minute: most are split
train/validation/test by sequence, a few are held out whole as out-of-distribution (OOD) data.

1. Read the BLAST databases of Debian's `metastudent-data` (Swiss-Prot 2014_01 entries with Gene
   Ontology terms); keep each distinct sequence once, under its first accession.
2. Cluster with mmseqs2 (30% identity, 80% coverage of both): a cluster is a family.
3. Keep families that are large, of moderate length and similar to their representative.
4. Put them in a fixed pseudo-random order (SHA-256 of the seed and the family's name) and take
   them in that order: first the in-distribution families, then the OOD ones, skipping each that
   mmseqs2 finds to be related to an in-distribution sequence.

Usage:
    apt-get download metastudent-data && dpkg-deb -x metastudent-data_*.deb unpacked
    python tools/make_protein_data.py --work scratch \
        --source unpacked/usr/share/metastudent-data/dataset_201401
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blast import is_protein, read_blast_database
from performers.app.errors import UserError
from performers.proteins.corpus.mmseqs import Mmseqs

SPLITS = ("train", "validation", "test", "ood")
_DATABASES = ("BPO", "MFO", "CCO")
_LINE = 60
_OUTPUT = Path(__file__).resolve().parents[1] / "src" / "performers" / "proteins" / "data"


@dataclasses.dataclass(frozen=True)
class Selection:
    """Criteria by which families are taken; recorded in the manifest."""

    seed: int = 0
    identity: float = 0.3
    coverage: float = 0.8
    min_members: int = 300
    max_family_residues: int = 150_000
    min_length_p5: float = 60.0
    max_length_p95: float = 250.0
    min_median_identity: float = 0.48
    in_distribution_residues: int = 950_000
    ood_residues: int = 350_000
    min_ood_families: int = 4
    ood_max_identity: float = 0.3
    ood_min_coverage: float = 0.5
    ood_max_evalue: float = 1e-3
    ood_hit_evalue: float = 0.1


@dataclasses.dataclass(frozen=True)
class Family:
    """A cluster: its representative's accession, and its members' accessions, sorted."""

    name: str
    members: tuple[str, ...]
    residues: int


def distinct_sequences(source: Path) -> dict[str, str]:
    """Return {accession: sequence}, each distinct sequence once, sorted by accession.

    Of several accessions with one sequence the first in alphabetical order is kept.
    """
    first: dict[str, str] = {}
    for name in _DATABASES:
        for title, sequence in read_blast_database(source / name / "goasp.fasta"):
            if not is_protein(sequence):
                continue
            accession = title.partition("|")[0]
            known = first.get(sequence)
            if known is None or accession < known:
                first[sequence] = accession
    return dict(sorted((accession, sequence) for sequence, accession in first.items()))


def fasta_text(records: Iterable[tuple[str, str]]) -> str:
    """FASTA of names and sequences, with lines of 60 residues."""
    lines = []
    for name, sequence in records:
        lines.append(f">{name}")
        lines.extend(sequence[i : i + _LINE] for i in range(0, len(sequence), _LINE))
    return "\n".join(lines) + "\n"


def clustered(
    mmseqs: Mmseqs, work: Path, sequences: dict[str, str], rule: Selection
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Cluster `sequences`.

    Returns:
        {representative: members}, and {member: identity to its representative, 0..1}, the
        latter 0 where mmseqs2 reports no direct alignment.
    """
    (work / "all.fasta").write_text(fasta_text(sequences.items()))
    mmseqs.create_database("all.fasta", "all")
    clusters: dict[str, list[str]] = defaultdict(list)
    for representative, member in mmseqs.cluster("all", rule.identity, rule.coverage):
        clusters[representative].append(member)
    mmseqs.run("align", "all", "all", "clusters", "aligned", "--alignment-mode", "3")
    columns = ("--format-output", "theader,fident")
    mmseqs.run("convertalis", "all", "all", "aligned", "identity.tsv", *columns)
    identity = dict.fromkeys(sequences, 0.0)
    for header, share in mmseqs.rows("identity.tsv"):
        identity[header.split()[0]] = float(share)
    return dict(clusters), identity


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """`names` in an order fixed by the seed alone, the same with every library version."""
    return sorted(names, key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).hexdigest())


def eligible_families(
    clusters: dict[str, list[str]],
    identity: dict[str, float],
    sequences: dict[str, str],
    rule: Selection,
) -> dict[str, Family]:
    """The clusters that `rule` allows, by name (their representative's accession)."""
    families = {}
    for name, members in clusters.items():
        lengths = [len(sequences[m]) for m in members]
        if (
            len(members) >= rule.min_members
            and sum(lengths) <= rule.max_family_residues
            and np.percentile(lengths, 5) >= rule.min_length_p5
            and np.percentile(lengths, 95) <= rule.max_length_p95
            and np.median([identity[m] for m in members]) >= rule.min_median_identity
        ):
            families[name] = Family(name, tuple(sorted(members)), sum(lengths))
    return families


def take_until(families: Sequence[Family], residues: int, at_least: int = 0) -> list[Family]:
    """The first families of the sequence that together reach `residues` and `at_least` families."""
    taken: list[Family] = []
    total = 0
    for family in families:
        if total >= residues and len(taken) >= at_least:
            break
        taken.append(family)
        total += family.residues
    if total < residues or len(taken) < at_least:
        raise ValueError(
            f"only {len(taken)} families with {total} residues could be taken, {at_least} with "
            f"{residues} were wanted; ask for less or loosen the selection"
        )
    return taken


def related_to(
    candidates: Sequence[Family],
    kept: Sequence[Family],
    sequences: dict[str, str],
    rule: Selection,
    mmseqs: Mmseqs,
    work: Path,
) -> dict[str, int]:
    """Number of sequences of each candidate family that are related to a sequence of `kept`.

    Related: an e-value below `ood_max_evalue`; or one up to `ood_hit_evalue` (more are chance) with
    identity of at least `ood_max_identity` over at least `ood_min_coverage` of one of the two.
    Unrelated candidates are not in the result.
    """
    family_of = {m: f.name for f in candidates for m in f.members}
    targets = [m for f in kept for m in f.members]
    for file, names in (("query.fasta", list(family_of)), ("target.fasta", targets)):
        (work / file).write_text(fasta_text((m, sequences[m]) for m in names))
    hits = mmseqs.search(
        "query.fasta", "target.fasta", sensitivity=7.5, max_evalue=rule.ood_hit_evalue
    )
    related: dict[str, set[str]] = defaultdict(set)
    for hit in hits:
        alike = hit.identity >= rule.ood_max_identity and hit.coverage >= rule.ood_min_coverage
        if alike or hit.evalue < rule.ood_max_evalue:
            related[family_of[hit.query]].add(hit.query)
    return {name: len(members) for name, members in related.items()}


def split_family(family: Family, seed: int) -> dict[str, list[str]]:
    """A family's members, 80/10/10 to train/validation/test."""
    order = shuffled(family.members, seed)
    tenth = round(len(order) / 10)
    return {
        "validation": sorted(order[:tenth]),
        "test": sorted(order[tenth : 2 * tenth]),
        "train": sorted(order[2 * tenth :]),
    }


def write_gzip(path: Path, text: str) -> None:
    """Write `text` compressed, the same bytes every time (no name, no date)."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text.encode("ascii"))
    path.write_bytes(buffer.getvalue())


def make(source: Path, work: Path, output: Path, rule: Selection, threads: int) -> None:
    """Do the whole job; see the top of this file."""
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise ValueError(f"--work {work} is not empty; mmseqs2 needs an empty folder, name another")
    mmseqs = Mmseqs(work, threads)
    sequences = distinct_sequences(source)
    _say(f"{len(sequences)} distinct sequences, {sum(map(len, sequences.values()))} residues")
    clusters, identity = clustered(mmseqs, work, sequences, rule)
    _write_table(work / "families.tsv", clusters, sequences, identity)
    eligible = eligible_families(clusters, identity, sequences, rule)
    _say(f"{len(clusters)} clusters, {len(eligible)} of them eligible")

    order = [eligible[name] for name in shuffled(list(eligible), rule.seed)]
    kept = take_until(order, rule.in_distribution_residues)
    candidates = order[len(kept) :]
    related = related_to(candidates, kept, sequences, rule, mmseqs, work)
    held_out = take_until(
        [f for f in candidates if f.name not in related], rule.ood_residues, rule.min_ood_families
    )
    passed_over = candidates[: candidates.index(held_out[-1])]
    rejected = {f.name: related[f.name] for f in passed_over if f.name in related}

    parts: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for family in sorted(kept, key=lambda f: f.name):
        for split, members in split_family(family, rule.seed).items():
            parts[split] += [(family.name, m) for m in members]
    for family in sorted(held_out, key=lambda f: f.name):
        parts["ood"] += [(family.name, m) for m in family.members]

    output.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "source": "UniProtKB/Swiss-Prot release 2014_01, entries with Gene Ontology terms",
        "licence": "CC BY 4.0, The UniProt Consortium",
        "mmseqs_version": mmseqs.version,
        "selection": dataclasses.asdict(rule),
        "distinct_sequences": len(sequences),
        "clusters": len(clusters),
        "eligible_families": len(eligible),
        "ood_families_rejected": rejected,
        "splits": {split: _write_split(output, split, parts[split], sequences) for split in SPLITS},
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (output / "README.md").write_text(_readme(manifest, rule))
    for split in SPLITS:
        _say(f"{split}: {manifest['splits'][split]}")


def _write_split(
    output: Path, split: str, members: Sequence[tuple[str, str]], sequences: dict[str, str]
) -> dict[str, Any]:
    text = fasta_text(
        (f"{accession} family={family}", sequences[accession]) for family, accession in members
    )
    path = output / f"{split}.fasta.gz"
    write_gzip(path, text)
    return {
        "file": path.name,
        "sequences": len(members),
        "residues": sum(len(sequences[accession]) for _, accession in members),
        "families": len({family for family, _ in members}),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "fasta_sha256": hashlib.sha256(text.encode("ascii")).hexdigest(),
    }


def _write_table(
    path: Path,
    clusters: dict[str, list[str]],
    sequences: dict[str, str],
    identity: dict[str, float],
) -> None:
    with path.open("w") as table:
        table.write("representative\tmember\tlength\tidentity\n")
        for name in sorted(clusters):
            for member in sorted(clusters[name]):
                table.write(f"{name}\t{member}\t{len(sequences[member])}\t{identity[member]:.3f}\n")


def _readme(manifest: dict[str, Any], rule: Selection) -> str:
    splits = manifest["splits"]
    rows = "\n".join(
        f"| `{splits[name]['file']}` | {splits[name]['sequences']:,} | "
        f"{splits[name]['residues']:,} | {splits[name]['families']} |"
        for name in SPLITS
    )
    rejected = len(manifest["ood_families_rejected"])
    defaults = Selection()
    changed = "".join(
        f" --{field.name.replace('_', '-')} {getattr(rule, field.name)}"
        for field in dataclasses.fields(rule)
        if getattr(rule, field.name) != getattr(defaults, field.name)
    )
    return f"""# Protein sequences

Sequences from UniProtKB/Swiss-Prot, release 2014_01, by The UniProt Consortium
(https://www.uniprot.org), under the Creative Commons Attribution 4.0 International licence
(CC BY 4.0, https://creativecommons.org/licenses/by/4.0/). The sequences are unchanged; they were
selected, each distinct sequence kept once, and regrouped as described here.

| file | sequences | residues | families |
|---|---|---|---|
{rows}

A header reads `>ACCESSION family=REPRESENTATIVE`: the UniProt accession, and the accession of the
representative of its family. `manifest.json` holds counts, SHA-256 sums (of the file, and of the
text in it) and every parameter.

## How they were selected

The {manifest["distinct_sequences"]:,} distinct Swiss-Prot sequences with Gene Ontology terms were
clustered with mmseqs2 {manifest["mmseqs_version"]} at {rule.identity:.0%} identity and
{rule.coverage:.0%} coverage of both sequences into {manifest["clusters"]:,} families. Eligible are
the {manifest["eligible_families"]} families with at least {rule.min_members} members, at most
{rule.max_family_residues:,} residues in all, a 5th percentile of length of at least
{rule.min_length_p5:g} and a 95th of at most {rule.max_length_p95:g} residues, and a median identity
to the representative of at least {rule.min_median_identity:.0%}. They were put in a pseudo-random
order (SHA-256 of the seed and the family's name) and taken whole: first
{rule.in_distribution_residues:,} residues, split 80/10/10 by sequence within each family into
train, validation and test; then at least {rule.ood_residues:,} residues and
{rule.min_ood_families} families for `ood`. A family of which any member has a hit in the former
(mmseqs2 search, sensitivity 7.5) is passed over for `ood` ({rejected} were, see the manifest); a
hit is an e-value below {rule.ood_max_evalue:g}, or one up to {rule.ood_hit_evalue:g} with an
identity of at least {rule.ood_max_identity:.0%} over at least {rule.ood_min_coverage:.0%} of either
sequence.

The families are redundant on purpose (a test sequence has close relatives in train), so that a
small model can learn from them quickly: scores on `test` say that learning works, not how well a
model knows proteins at large.

## To make them again

The program `mmseqs` (Debian package `mmseqs2`) and numpy are needed, and the sequences as Debian's
package `metastudent-data` 2.0.1 has them:

    apt-get download metastudent-data && dpkg-deb -x metastudent-data_*.deb unpacked
    python tools/make_protein_data.py --work scratch{changed} \\
        --source unpacked/usr/share/metastudent-data/dataset_201401

The result is the same every time with one version of mmseqs2; with another zlib the compressed
bytes may differ, the text in them does not (`fasta_sha256`).
"""


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="dataset_201401, unpacked")
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder, empty or new (2 GB)"
    )
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    for field in dataclasses.fields(Selection):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help="default: %(default)s",
        )
    arguments = parser.parse_args()
    rule = Selection(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Selection)})
    try:
        make(arguments.source, arguments.work, arguments.output, rule, arguments.threads)
    except (OSError, ValueError, UserError) as error:
        _say(f"make_protein_data: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
