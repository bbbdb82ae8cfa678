"""Long documents, and passages cut out of them to find them by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from studies.passages import text_windows

if TYPE_CHECKING:
    from studies.long_documents.__main__ import LongDocumentsOptions

CHUNK = 512
"""Tokens of a chunk, the special ones at its ends included."""
_SPECIAL = 2


class Documents(NamedTuple):
    """Token ids without special ones.

    Attributes:
        texts: ``(documents, tokens)``, a whole number of chunks each.
        passages: ``(documents, passages, tokens)``; what the texts do not have.
    """

    texts: Tensor
    passages: Tensor


def text_tokens(length: int) -> int:
    """Number of tokens of text in a document whose chunks have ``length`` tokens together."""
    return length // CHUNK * (CHUNK - _SPECIAL)


def read_documents(
    tokenizer: Any,
    files: Sequence[Path],
    length: int,
    options: LongDocumentsOptions,
) -> Documents:
    """Cut documents from the beginning of each file, and passages out of the documents.

    Documents of all the options' lengths begin at the same places. A document is divided into
    as many parts as it has passages, and each passage comes from a random place of its part: the
    text around it stays, the passage does not.
    """
    generator = torch.Generator().manual_seed(options.seed)
    passages, passage_tokens = options.passages, options.passage_tokens
    cut = passages * passage_tokens
    stride = text_tokens(options.lengths[-1]) + cut + _SPECIAL
    texts, queries = [], []
    for file in files:
        for window in text_windows(tokenizer, file, stride, options.per_file):
            tokens = window[1 : 1 + text_tokens(length) + cut]
            part = len(tokens) // passages
            offsets = torch.randint(part - passage_tokens + 1, (passages,), generator=generator)
            starts = torch.arange(passages) * part + offsets
            taken = starts[:, None] + torch.arange(passage_tokens)
            kept = torch.ones(len(tokens), dtype=torch.bool)
            kept[taken] = False
            texts.append(tokens[kept])
            queries.append(tokens[taken])
    return Documents(torch.stack(texts), torch.stack(queries))


def with_special_tokens(tokenizer: Any, tokens: Tensor) -> Tensor:
    """Token ids ``(B, L)`` between the tokens that begin and end a text."""
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    first, last = (torch.full((len(tokens), 1), token) for token in ends)
    return torch.cat((first, tokens, last), dim=1)
