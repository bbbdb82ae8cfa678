"""Bits per byte of texts, as a whole and by the place within the context."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from performers.app.errors import UserError
from performers.app.progress import Progress
from performers.models.arguments import CACHE_KEYWORD
from performers.models.registry import ATTENTIONS
from performers.proteins.model_folder import check_input_length, load_model, model_max_length
from performers.streams.segments import IGNORED, Segment, Segments
from performers.streams.subwords import is_bytes, write_subwords
from performers.streams.text import Texts, find_texts, read_bytes

PLACES = 16
"""Parts of the context whose bits per byte are told apart."""


def evaluate_texts(
    model: nn.Module,
    texts: Texts,
    *,
    length: int,
    context: int | None = None,
    carry: bool = False,
    rows: int = 1,
    tokens_at_most: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss and bits per byte of a causal model, in eval mode and put back afterwards.

    Each text is cut into contexts, whose tokens are predicted from those before them in the same
    context: by segments, each with the state of the one before it (``carry``), or from nothing.

    Args:
        model: A ``PerformerForCausalLM``, or a model with its call.
        texts: The texts.
        length: Tokens of a segment.
        context: Tokens of a context, a multiple of ``length``; None: whole texts with ``carry``,
            a segment without.
        carry: Hand the state on within a context.
        rows: Contexts in a batch.
        tokens_at_most: Read contexts at equal distances, of about so many tokens together; of a
            longer context so many tokens.
        progress: Called with the contexts done and in all.

    Returns:
        ``loss`` (nats a token), ``perplexity``, ``accuracy``, ``tokens`` (predicted),
        ``bits_per_byte``, and ``places``: of each of 16 parts of the context (of its first 16
        segments if it is a whole text) ``start``, ``stop``, ``tokens`` and ``bits_per_byte``.

    Raises:
        ValueError: ``context`` is no multiple of ``length``, or there is nothing to predict.
    """
    if context is not None and context % length:
        raise ValueError(f"context must be a multiple of length ({length}), got {context}")
    whole = context is None and carry
    blocks = _blocks(texts, None if whole else context or length, tokens_at_most)
    if not blocks:
        raise ValueError("texts must have two tokens at least, of which the second is predicted")
    width = -(-(PLACES * length if whole else context or length) // PLACES)
    sums = torch.zeros(3, PLACES + 1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(blocks), rows):
            group = blocks[first : first + rows]
            for place, measured in _measure(model, Segments(texts, length), group, carry):
                part = place.div(width, rounding_mode="floor").clamp_max(PLACES)
                sums.index_add_(1, part, measured)
            if progress is not None:
                progress(min(first + rows, len(blocks)), len(blocks))
    finally:
        model.train(was_training)
    return _metrics(texts, sums, width)


def evaluate_folder(
    model: Path,
    paths: Sequence[Path],
    *,
    length: int | None,
    batch_tokens: int,
    carry: bool,
    report: Callable[[str], None],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`evaluate_texts` of the model in a folder on the texts at some paths.

    Segments are as long as trained by default; ``report`` is called with lines on files that are
    left out.

    Raises:
        UserError: The model is none of text, has no state to hand on or positions that end, or no
            text can be read.
    """
    network, tokenizer = load_model(model, of_text=True)
    config: Any = network.config
    length = length or model_max_length(tokenizer)
    if carry and ATTENTIONS[config.attention].cache is None:
        raise UserError(
            f"--carry-state: {config.attention} attention has no state; leave the flag out"
        )
    if carry and config.has_position_table:
        raise UserError(
            f"--carry-state has no last position, and the model's {config.position_embedding} ones "
            f"end at {config.max_position_embeddings}; leave the flag out"
        )
    check_input_length(network, length)
    files = find_texts(paths)
    with tempfile.TemporaryDirectory() as folder:
        if is_bytes(tokenizer):
            texts = read_bytes(files, report)
        else:
            texts = write_subwords(files, tokenizer, Path(folder), report)
        return evaluate_texts(
            network,
            texts,
            length=length,
            carry=carry,
            rows=max(1, batch_tokens // length),
            progress=progress,
        )


Block = tuple[int, int, int]
"""A text, and the first and the last of its tokens that are predicted from."""


def _blocks(texts: Texts, context: int | None, at_most: int | None) -> list[Block]:
    """The contexts of all texts, the longest first; some of them if they are too many."""
    blocks = [
        (document, start, min(start + (context or count), count - 1))
        for document, count in enumerate(texts.lengths.tolist())
        for start in range(0, count - 1, context or count)
    ]
    if at_most is not None and blocks:
        blocks = [(text, start, min(stop, start + at_most)) for text, start, stop in blocks]
        size = sum(stop - start for _, start, stop in blocks) / len(blocks)
        wanted = min(len(blocks), max(1, round(at_most / size)))
        chosen = np.linspace(0, len(blocks) - 1, wanted).round().astype(int)
        blocks = [blocks[index] for index in chosen]
    return sorted(blocks, key=lambda block: block[1] - block[2])


@torch.no_grad()
def _measure(
    model: nn.Module, dataset: Segments, group: list[Block], carry: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in the context, and loss, hits and counts there, ``(3, n)``, by segment."""
    length, cache = dataset.length, None
    device = next(model.parameters()).device
    for begun in range(0, group[0][2] - group[0][1], length):
        batch = default_collate(
            [
                dataset[Segment(document, min(start + begun, stop), begun == 0)]
                for document, start, stop in group
            ]
        )
        labels = batch["labels"].to(device)
        for row, (_, start, stop) in enumerate(group):
            # A context may end within the segment of a longer one beside it.
            labels[row, max(0, stop - start - begun) :] = IGNORED
        past = {CACHE_KEYWORD: cache, "use_cache": True} if carry else {"use_cache": False}
        output = model(batch["input_ids"].to(device), **past)
        cache = getattr(output, CACHE_KEYWORD) if carry else None
        logits = output.logits.float()
        kept = labels != IGNORED
        found = labels[kept]
        loss = F.cross_entropy(logits[kept], found, reduction="none")
        hits = logits.argmax(-1)[kept] == found
        place = begun + torch.arange(length).expand(len(group), -1)[kept.cpu()]
        measured = torch.stack((loss.double(), hits.double(), torch.ones_like(loss).double()))
        yield place, measured.cpu()


def _metrics(texts: Texts, sums: Tensor, width: int) -> dict[str, Any]:
    nats, hits, counts = sums.sum(1).tolist()
    # Bytes of predicted tokens, at the mean of all tokens.
    bits = texts.tokens / texts.size / math.log(2)
    loss = nats / counts
    places = [
        {
            "start": part * width,
            "stop": (part + 1) * width,
            "tokens": int(count),
            "bits_per_byte": total / count * bits,
        }
        for part, (total, count) in enumerate(sums[[0, 2], :PLACES].T.tolist())
        if count
    ]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": hits / counts,
        "tokens": int(counts),
        "bits_per_byte": loss * bits,
        "places": places,
    }
