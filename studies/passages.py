"""Passages of one length from the beginning of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performers.convert.distillation.texts import TextFile

# Tokens before a cut that may differ from those of the whole file.
_MARGIN = 64


def text_windows(
    tokenizer: Any, text: str | Path, length: int, count: int, *, skip: int = 0
) -> Tensor:
    """Cut the beginning of a text or FASTA file into consecutive inputs of one length.

    Windows are as in `split_text`, but the sequences of a FASTA file follow one another with the
    tokenizer's separator between them, and ``skip`` windows are left out at the beginning. Returns
    token ids ``(count, length)``.
    """
    file = TextFile(tokenizer, Path(text), length)
    needed, stop = (skip + count) * file.body, file.start
    ids: list[int] = []
    while stop < file.size and len(ids) < needed + _MARGIN:
        stop = file.boundary(2 * stop + 8 * (needed + _MARGIN))
        ids = file.tokens(stop)
    if len(ids) < needed:
        raise ValueError(
            f"{text} has {len(ids)} tokens, enough for {len(ids) // file.body} windows of "
            f"{length}; {skip + count} were asked for: pass a longer text or ask for less"
        )
    passages = [ids[first : first + file.body] for first in range(0, needed, file.body)][skip:]
    file.check_known(torch.tensor(passages))
    return torch.tensor([[*file.before, *passage, *file.after] for passage in passages])
