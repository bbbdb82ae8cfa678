"""The paths of the embedded sequences."""

import gzip

import pytest

from performers.proteins.embedded import SPLITS, embedded_fasta


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_is_a_gzipped_fasta(split):
    path = embedded_fasta(split)
    assert path.name == f"{split}.fasta.gz"
    with gzip.open(path, "rt") as lines:
        assert next(lines).startswith(">")


def test_unknown_split_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"train, validation, test, ood; got 'dev'"):
        embedded_fasta("dev")
    with pytest.raises(ValueError, match="split must be one of"):
        embedded_fasta("../data/train")
