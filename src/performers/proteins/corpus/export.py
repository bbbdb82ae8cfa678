"""Copies of a corpus in formats for object stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from performers.app.files import write_json
from performers.app.progress import Progress
from performers.proteins.corpus.shards import Corpus


def export_mds(corpus: Corpus, folder: Path, *, progress: Progress | None = None) -> None:
    """Write a corpus as Mosaic Data Shards, which ``streaming.StreamingDataset`` reads.

    Each split is a folder. A sample is a sequence: ``name``, and ``tokens`` (uint8, with the begin
    and the end token). The manifest of the corpus is copied beside them.

    Raises:
        ImportError: The package mosaicml-streaming is missing.
    """
    try:
        from streaming import MDSWriter
    except ImportError as error:
        raise ImportError(
            f"export needs the package mosaicml-streaming ({error}): pip install --no-deps "
            "mosaicml-streaming (it asks for transformers 4, which it does not need for this), "
            "and what it imports"
        ) from error
    splits = corpus.manifest["splits"]
    total, done = sum(entry["sequences"] for entry in splits.values()), 0
    columns = {"name": "str", "tokens": "ndarray:uint8"}
    for name in splits:
        with MDSWriter(out=str(folder / name), columns=columns, hashes=["sha1"]) as writer:
            for protein, tokens in corpus.split(name).named():
                writer.write({"name": protein, "tokens": np.array(tokens)})
                done += 1
                if progress is not None and (done % 10_000 == 0 or done == total):
                    progress(done, total)
    write_json(folder / "manifest.json", corpus.manifest)
