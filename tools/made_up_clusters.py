"""Made-up clusters of UniRef50, ten residues each: ``made_up_clusters.py COUNT FILE.fasta.gz``.

For the memory of ``performers data uniref50``, which depends on names more than on residues.
"""

import argparse
import gzip

import numpy as np

_RESIDUES, _AT_ONCE = 10, 500_000


def write_clusters(count: int, path: str) -> None:
    """Write so many clusters, named in order."""
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    random = np.random.default_rng(0)
    with gzip.open(path, "wb", compresslevel=1) as file:
        for first in range(0, count, _AT_ONCE):
            some = min(_AT_ONCE, count - first)
            text = letters[random.integers(0, letters.size, (some, _RESIDUES))].tobytes().decode()
            records = (
                f">UniRef50_A0A{first + i:09d} n=1\n{text[_RESIDUES * i : _RESIDUES * (i + 1)]}\n"
                for i in range(some)
            )
            file.write("".join(records).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("path")
    given = parser.parse_args()
    write_clusters(given.count, given.path)
