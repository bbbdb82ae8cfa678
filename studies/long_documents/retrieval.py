"""Embeddings of documents by several methods, and the ranks of the right documents."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from performers.app.files import write_atomically
from performers.cli.console import note
from performers.convert import extend_positions_, load_performer
from performers.convert.distillation.pretrained import load_model
from performers.convert.interface.positions import learned_positions
from studies.long_documents.documents import (
    CHUNK,
    Documents,
    read_documents,
    with_special_tokens,
)
from studies.pages import Table
from studies.parts import Measures, Part, section

if TYPE_CHECKING:
    from studies.long_documents.__main__ import LongDocumentsOptions

TRUNCATED, MEAN, NEAREST = "first chunk", "mean of chunks", "nearest chunk"
REPEATED = "original, positions repeated"
INTERPOLATED = "original, positions interpolated"
CONVERTED = "converted"
_METHODS = (TRUNCATED, MEAN, NEAREST, REPEATED, INTERPOLATED, CONVERTED)
_RESAMPLES = 10_000


class Retrieval:
    """The measurements of a model and its conversion on some texts.

    Embeddings are kept in ``embeddings`` below the output folder until their part is done.
    """

    def __init__(self, options: LongDocumentsOptions, files: Sequence[Path]) -> None:
        self.options, self.files = options, files
        loaded = load_model(options.model, head=False)
        self.original, self.tokenizer = loaded.model, loaded.tokenizer

    def parts(self) -> Measures:
        """Measurements by name, those of a length after one another."""
        found: Measures = {}
        for length in self.options.lengths:
            found[f"{length}, chunks"] = partial(self._chunks, length)
            methods = [CONVERTED]
            if length <= self.options.exact_up_to:
                methods.append(REPEATED)
            if length == self.options.lengths[0]:
                methods.append(INTERPOLATED)
            found |= {f"{length}, {x}": partial(self._whole, x, length) for x in methods}
        return found

    @cached_property
    def _converted(self) -> Any:
        model = load_performer(self.options.converted)
        return extend_positions_(model, self.options.lengths[-1])

    def _chunks(self, length: int) -> Part:
        """Ranks by the first chunk, the mean of all and the nearest; the chunks are the same."""
        documents = read_documents(self.tokenizer, self.files, length, self.options)
        queries = self._queries(self.original, documents)
        chunks, seconds = self._embedded(
            f"{length} chunks", self.original, documents.texts, length // CHUNK
        )
        each = queries @ chunks.flatten(0, 1).T
        scores = {
            TRUNCATED: queries @ chunks[:, 0].T,
            MEAN: queries @ F.normalize(chunks.mean(dim=1), dim=-1).T,
            NEAREST: each.unflatten(1, chunks.shape[:2]).amax(dim=2),
        }
        times = {TRUNCATED: seconds[:, 0], MEAN: seconds.sum(axis=1), NEAREST: seconds.sum(axis=1)}
        return {name: self._result(scores[name], times[name]) for name in scores}

    def _whole(self, method: str, length: int) -> Part:
        """Ranks by one embedding of the whole document."""
        model = self._converted if method == CONVERTED else copy.deepcopy(self.original)
        if method == REPEATED:
            extend_positions_(model, length)
        elif method == INTERPOLATED:
            interpolate_positions_(model, length)
        documents = read_documents(self.tokenizer, self.files, length, self.options)
        queries = self._queries(model, documents)
        found, seconds = self._embedded(f"{length} {method}", model, documents.texts, 1)
        return {method: self._result(queries @ found[:, 0].T, seconds[:, 0])}

    def _queries(self, model: Any, documents: Documents) -> Tensor:
        passages = documents.passages.flatten(0, 1).split(16)
        return torch.cat([self._embed(model, rows)[0] for rows in passages])

    def _embedded(self, name: str, model: Any, texts: Tensor, pieces: int) -> tuple[Tensor, Any]:
        """Embeddings ``(documents, pieces, D)`` and seconds ``(documents, pieces)``.

        They are kept in a file after each document, from which an interrupted part goes on.
        """
        title = name.replace(",", "").replace(" ", "-")
        file = self.options.output_folder / "embeddings" / f"{title}.npz"
        embeddings: list[Any] = []
        seconds: list[Any] = []
        if file.exists():
            with np.load(file) as kept:
                embeddings, seconds = list(kept["embeddings"]), list(kept["seconds"])
        for row in texts[len(embeddings) :]:
            found = [self._embed(model, piece[None]) for piece in row.chunk(pieces)]
            embeddings.append(torch.cat([vectors for vectors, _ in found]).numpy())
            seconds.append(np.array([time for _, time in found]))
            content = io.BytesIO()
            np.savez(content, embeddings=np.stack(embeddings), seconds=np.stack(seconds))
            write_atomically(file, content.getvalue())
            note(f"{name}: {len(embeddings)} of {len(texts)} documents")
        return torch.from_numpy(np.stack(embeddings)), np.stack(seconds)

    @torch.no_grad()
    def _embed(self, model: Any, tokens: Tensor) -> tuple[Tensor, float]:
        """Unit vectors: means of the last hidden states; and the processor time they took."""
        started = time.process_time()
        states = model(input_ids=with_special_tokens(self.tokenizer, tokens)).last_hidden_state
        vectors = F.normalize(states.mean(dim=1), dim=-1)
        return vectors, time.process_time() - started

    def _result(self, scores: Tensor, seconds: Any) -> Part:
        return {"ranks": ranks(scores).tolist(), "seconds": float(np.median(seconds))}


def ranks(scores: Tensor) -> Tensor:
    """Ranks of the right documents, from 1; ties count against them.

    Args:
        scores: ``(documents * passages, documents)``, the passages of a document in succession.
    """
    queries, documents = scores.shape
    right = torch.arange(queries)[:, None] // (queries // documents)
    return (scores >= scores.gather(1, right)).sum(dim=1)


def interpolate_positions_(model: Any, length: int) -> None:
    """Stretch the table of learned positions to a length, linearly between its vectors."""
    before = learned_positions(model)
    extend_positions_(model, length)
    table: nn.Embedding = model.embeddings.position_embeddings
    trained = table.weight.detach()[:before].T[None]
    stretched = F.interpolate(trained, size=length, mode="linear", align_corners=True)
    table.weight = nn.Parameter(stretched[0].T.contiguous())


def difference(own: Any, other: Any) -> tuple[float, float]:
    """95% interval of a difference of recall@1, by bootstrap over documents.

    Both are ranks, ``(documents, passages)``.
    """
    gains = ((own == 1).astype(float) - (other == 1)).mean(axis=1)
    drawn = np.random.default_rng(0).integers(len(gains), size=(_RESAMPLES, len(gains)))
    low, high = np.quantile(gains[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def tables(parts: Mapping[str, Part], passages: int) -> dict[str, Table]:
    """The table of the parts that are done."""
    columns = ("tokens", "embedding", "recall@1", "MRR", "recall over mean of chunks", "seconds")
    rows = []
    for length in sorted({int(name.split(", ")[0]) for name in parts}):
        found = {x: y for part in section(parts, str(length)).values() for x, y in part.items()}
        places = {x: np.array(y["ranks"]).reshape(-1, passages) for x, y in found.items()}
        for name in (x for x in _METHODS if x in found):
            interval = ""
            if name != MEAN and MEAN in found:
                low, high = difference(places[name], places[MEAN])
                interval = f"{low:+.2f} to {high:+.2f}"
            recall, reciprocal = (places[name] == 1).mean(), (1 / places[name]).mean()
            figures = (f"{recall:.2f}", f"{reciprocal:.2f}", interval)
            rows.append((f"{length:,}", name, *figures, f"{found[name]['seconds']:.2f}"))
    return {"retrieval": Table(columns, rows, names=2)}
