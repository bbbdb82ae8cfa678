"""Proteins joined with their labels and groups.

Labels come from a table or from FASTA headers, `>NAME labels=A,B family=F`. Groups are clusters of
related sequences: a table of mmseqs2, the third column of the labels, or `family=` or `group=` in
the headers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from performers.app.errors import UserError
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.probe.labels import ProteinLabels

_HOW_TO_GROUP = (
    "group related sequences with `mmseqs easy-cluster proteins.fasta clusters tmp --min-seq-id "
    "0.3` and give its clusters_cluster.tsv as --groups, or the clusters.tsv in a folder that "
    "performers data wrote; or write the group in a third column of --labels, or family=NAME in "
    "the headers. "
    "--split random goes without, and then relatives of the test sequences are trained on"
)


@dataclass(frozen=True)
class ProbeTask:
    """Labelled proteins.

    Attributes:
        proteins: Their names.
        sequences: Their residues.
        labels: The labels, most frequent first.
        targets: Whether each protein has each label, (proteins, labels).
        groups: Number of each protein's group, (proteins,). Proteins with the same sequence share
            a group; in a task without groups each protein is its own.
        multiclass: Whether every protein has exactly one label.
        label_names: Label to what it means, where that is known.
        notes: What was left out, and why.
        source: Where the labels are from, for messages.
    """

    proteins: tuple[str, ...]
    sequences: tuple[str, ...]
    labels: tuple[str, ...]
    targets: NDArray[np.bool_]
    groups: NDArray[np.int64]
    multiclass: bool
    label_names: Mapping[str, str]
    notes: tuple[str, ...]
    source: str = "the FASTA headers"


def build_task(
    records: Sequence[ProteinRecord],
    *,
    labels: ProteinLabels | None = None,
    groups: Mapping[str, str] | None = None,
    grouped: bool = True,
    max_per_group: int | None = None,
    max_sequences: int | None = None,
    max_residues: int | None = None,
    seed: int = 0,
) -> ProbeTask:
    """Join proteins with their labels and groups.

    A protein is looked up by the first word of its header, then, for a header such as
    `>sp|P12345|NAME`, by the accession.

    Labels are read from the headers when None; groups then come from the third column of the
    labels, or else from the headers. The options are those of ``performers probe``: without
    `grouped` no groups are needed. Sequences keep their first `max_residues` residues.

    Returns:
        The task; proteins without an entry, and repeats of a name, are left out.

    Raises:
        UserError: No protein is labelled, there is only one label, groups are needed and there
            are none, or they are not needed and `groups` or `max_per_group` is given.
    """
    if not grouped:
        # To ignore what keeps relatives apart would let a reader believe that they were.
        for option, given in (("--groups", groups), ("--per-group", max_per_group)):
            if given is not None:
                raise UserError(
                    f"{option} has no use with --split random, which splits single proteins; "
                    "leave one of the two away"
                )
    if labels is None:
        written = {
            name: tuple(dict.fromkeys(filter(None, text.split(","))))
            for name, text in _from_headers(records, "labels").items()
        }
        labels = ProteinLabels(written, {}, {})
    labelled = labels.labels
    if not labelled:
        raise UserError(
            "the FASTA headers hold no labels=...; give a table of them as --labels (name, tab, "
            "labels with commas between)"
        )
    if groups is None:
        groups = labels.groups or {
            **_from_headers(records, "family"),
            **_from_headers(records, "group"),
        }
    if grouped and not groups:
        raise UserError(f"the proteins have no groups to split by; {_HOW_TO_GROUP}")
    left_out = Counter[str]()
    chosen: dict[str, tuple[str, tuple[str, ...], str]] = {}
    for record in records:
        found = record.look_up(labelled)
        group = record.look_up(groups)
        if record.name in chosen:
            left_out["repeats of a name"] += 1
        elif found is None:
            left_out["proteins without labels"] += 1
        elif grouped and group is None:
            left_out["labelled proteins without a group"] += 1
        else:
            chosen[record.name] = (record.sequence, found, group or "")
    if not chosen:
        needed = "both labels and a group" if grouped else "labels"
        raise UserError(
            f"none of the {len(records):,} proteins has {needed}: names in the "
            f"FASTA files are such as {records[0].name!r}, in the labels such as "
            f"{next(iter(labelled))!r} ({labels.place(next(iter(labelled)))})"
            + (f", in the groups such as {next(iter(groups))!r}" if grouped else "")
            + "; write the same names, or the accessions of headers such as sp|P12345|NAME"
        )
    shuffled = random.Random(seed).sample(list(chosen), len(chosen))
    if max_per_group is not None:
        taken = Counter[str]()
        for name in shuffled:
            taken[chosen[name][2]] += 1
            if taken[chosen[name][2]] > max_per_group:
                left_out["proteins beyond those drawn of their group"] += 1
                del chosen[name]
    drawn = set([name for name in shuffled if name in chosen][:max_sequences])
    if len(drawn) < len(chosen):
        left_out["proteins not drawn"] = len(chosen) - len(drawn)
    names = [name for name in chosen if name in drawn]
    counts = Counter(label for name in names for label in chosen[name][1])
    if len(counts) < 2 and not (counts and any(not chosen[name][1] for name in names)):
        raise UserError(
            f"{labels.place(names[0])}: the {len(names):,} labelled proteins of the FASTA files "
            f"have {len(counts)} label(s) between them, so there is nothing to tell apart; give at "
            "least two labels"
        )
    order = {label: column for column, (label, _) in enumerate(counts.most_common())}
    targets = np.zeros((len(names), len(order)), dtype=bool)
    for row, name in enumerate(names):
        targets[row, [order[label] for label in chosen[name][1]]] = True
    sequences = tuple(chosen[name][0][:max_residues] for name in names)
    cropped = sum(len(chosen[name][0]) > len(s) for name, s in zip(names, sequences, strict=True))
    notes = [f"{count:,} {reason} left out" for reason, count in left_out.items()]
    if cropped:
        notes.append(f"{cropped:,} sequences cropped to {max_residues:,} residues")
    return ProbeTask(
        proteins=tuple(names),
        sequences=sequences,
        labels=tuple(order),
        targets=targets,
        groups=_joined([chosen[name][2] for name in names], sequences)
        if grouped
        else np.arange(len(names)),
        multiclass=bool((targets.sum(1) == 1).all()),
        label_names={k: v for k, v in labels.names.items() if k in order},
        notes=tuple(notes),
        source=labels.source,
    )


def _from_headers(records: Sequence[ProteinRecord], field: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in records:
        value = record.field(field)
        if value is not None:
            found.setdefault(record.name, value)
    return found


def _joined(groups: Sequence[str], sequences: Sequence[str]) -> NDArray[np.int64]:
    """Numbers of the groups, those with a sequence in common made one."""
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = group = parent[parent[group]]
        return group

    first: dict[str, str] = {}
    for group, sequence in zip(groups, sequences, strict=True):
        parent[root(group)] = root(first.setdefault(sequence, group))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(root(group), len(numbers)) for group in groups])
