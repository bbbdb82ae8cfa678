"""A wheel of made-up molecules, as molsets has them, and an index of made-up packages."""

import gzip
import zipfile

import pytest


def chains(rings):
    return [
        f"C1{'C' * ring}C1{'C' * tail}{end}"
        for ring in rings
        for tail in range(12)
        for end in "CNO"
    ]


def index_of_packages(count):
    return "\n\n".join(
        f"Package: p{i}\nSection: {'libs' if i % 3 else 'doc'}\nDepends: p{i // 2}, p{3 * i}"
        for i in range(count)
    )


@pytest.fixture
def molsets(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / "molsets-0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for name, lines in {
            "train": chains((1, 2, 3)),
            "test_scaffolds": chains((4, 5, 6, 7, 8, 9)),
        }.items():
            text = "\n".join(["SMILES", *lines]).encode()
            wheel.writestr(f"moses/dataset/data/{name}.csv.gz", gzip.compress(text))
    return file
