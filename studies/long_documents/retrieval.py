"""Embeddings of documents by several methods, and the ranks of the right documents."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

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
from studies.parts import Part

TRUNCATED, MEAN, NEAREST = "first chunk", "mean of chunks", "nearest chunk"
REPEATED = "original, positions repeated"
INTERPOLATED = "original, positions interpolated"
CONVERTED = "converted"
_METHODS = (TRUNCATED, MEAN, NEAREST, REPEATED, INTERPOLATED, CONVERTED)
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Size:
    """Numbers that the results depend on.

    Attributes:
        lengths: Tokens of a document, rising multiples of 512.
        exact_up_to: Longest document that the original reads whole.
        per_file: Documents of a file.
        passages: Passages to find each document by.
        passage_tokens: Tokens of a passage.
        seed: Random seed of the places of the passages.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    exact_up_to: int = 8192
    per_file: int = 4
    passages: int = 6
    passage_tokens: int = 128
    seed: int = 0


class Retrieval:
    """The measurements of a model and its conversion on some files.

    Args:
        model: Folder of the original.
        converted: Folder of the converted model.
        files: Texts.
        size: Numbers that the results depend on.
        folder: Keeps embeddings until their part is done.
    """

    def __init__(
        self, model: str, converted: str, files: tuple[Path, ...], size: Size, folder: Path
    ) -> None:
        self.size, self.files, self.folder = size, files, folder
        self._paths = (model, converted)
        loaded = load_model(model, head=False)
        self.original, self.tokenizer = loaded.model, loaded.tokenizer

    def parts(self) -> dict[str, Callable[[], Part]]:
        """Measurements by name, those of a length after one another."""
        found: dict[str, Callable[[], Part]] = {}
        for length in self.size.lengths:
            found[f"{length}, chunks"] = partial(self._chunks, length)
            found[f"{length}, {CONVERTED}"] = partial(self._whole, CONVERTED, length)
            if length <= self.size.exact_up_to:
                found[f"{length}, {REPEATED}"] = partial(self._whole, REPEATED, length)
            if length == self.size.lengths[0]:
                found[f"{length}, {INTERPOLATED}"] = partial(self._whole, INTERPOLATED, length)
        return found

    @cached_property
    def _converted(self) -> Any:
        model = load_performer(self._paths[1])
        return extend_positions_(model, self.size.lengths[-1])

    def _documents(self, length: int) -> Documents:
        settings = asdict(self.size)
        names = ("per_file", "passages", "passage_tokens", "seed")
        chosen = {name: settings[name] for name in names}
        longest = self.size.lengths[-1]
        return read_documents(self.tokenizer, self.files, length, longest=longest, **chosen)

    def _chunks(self, length: int) -> Part:
        """Ranks by the first chunk, the mean of all and the nearest; the chunks are the same."""
        documents = self._documents(length)
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
        documents = self._documents(length)
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
        file = self.folder / f"{name.replace(',', '').replace(' ', '-')}.npz"
        embeddings: list[Any] = []
        seconds: list[Any] = []
        if file.exists():
            with np.load(file) as kept:
                embeddings, seconds = list(kept["embeddings"]), list(kept["seconds"])
        for row in texts[len(embeddings) :]:
            found = [self._embed(model, piece[None]) for piece in row.chunk(pieces)]
            embeddings.append(torch.cat([vectors for vectors, _ in found]).numpy())
            seconds.append(np.array([time for _, time in found]))
            _keep(file, np.stack(embeddings), np.stack(seconds))
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


def difference(own: Any, other: Any, *, seed: int = 0) -> tuple[float, float]:
    """95% interval of a difference of recall@1, by bootstrap over documents.

    Args:
        own: Ranks, ``(documents, passages)``.
        other: Those of the method that it is compared with.
        seed: Random seed of the resampling.
    """
    gains = ((own == 1).astype(float) - (other == 1)).mean(axis=1)
    drawn = np.random.default_rng(seed).integers(len(gains), size=(_RESAMPLES, len(gains)))
    low, high = np.quantile(gains[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def tables(size: Size, parts: Mapping[str, Part]) -> dict[str, Table]:
    """The table of the parts that are done."""
    columns = ("tokens", "embedding", "recall@1", "MRR", "recall over mean of chunks", "seconds")
    rows = []
    for length in size.lengths:
        found: dict[str, Any] = {}
        for name, part in parts.items():
            if name.startswith(f"{length}, "):
                found |= part
        places = {
            name: np.array(x["ranks"]).reshape(-1, size.passages) for name, x in found.items()
        }
        for name in (x for x in _METHODS if x in found):
            interval = ""
            if name != MEAN and MEAN in found:
                low, high = difference(places[name], places[MEAN])
                interval = f"{low:+.2f} to {high:+.2f}"
            recall, reciprocal = (places[name] == 1).mean(), (1 / places[name]).mean()
            figures = (f"{recall:.2f}", f"{reciprocal:.2f}", interval)
            rows.append((f"{length:,}", name, *figures, f"{found[name]['seconds']:.2f}"))
    return {"retrieval": Table(columns, rows, names=2)}


def _keep(file: Path, embeddings: Any, seconds: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    np.savez(content, embeddings=embeddings, seconds=seconds)
    write_atomically(file, content.getvalue())
