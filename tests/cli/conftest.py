"""Sequences and models that the commands are run on."""

import pytest

from tests.proteins.runs import make_model_folder, proteins, write_sequences


@pytest.fixture(scope="session")
def fasta(tmp_path_factory):
    return write_sequences(tmp_path_factory.mktemp("data") / "proteins.fasta", proteins())


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "masked")


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "causal", "clm")
