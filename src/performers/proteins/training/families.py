"""Families of the proteins to train and to validate on."""

from collections.abc import Sequence

from performers.app.errors import UserError
from performers.proteins.corpus import Corpus
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.probe.labels import read_groups


def corpus_families(corpus: Corpus, split: str) -> list[str]:
    """Families of the proteins of a split: clusters, by the names of their representatives.

    Raises:
        UserError: The corpus has no table of clusters, or a protein is not in it.
    """
    clusters = read_groups(corpus.folder / "clusters.tsv")
    names = corpus.split(split).names
    unknown = next((name for name in names if name not in clusters), None)
    if unknown is not None:
        raise UserError(f"{corpus.folder / 'clusters.tsv'} lacks {unknown}; prepare it again")
    return [clusters[name] for name in names]


def header_families(records: Sequence[ProteinRecord]) -> list[str]:
    """Families of proteins by ``family=NAME`` in their headers.

    Raises:
        UserError: A header has none.
    """
    found = []
    for record in records:
        family = record.field("family")
        if family is None:
            raise UserError(
                f"--families: the header of {record.name!a} names no family; write family=NAME "
                "in each, or train on a corpus of performers data"
            )
        found.append(family)
    return found
