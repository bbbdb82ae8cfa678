"""A language model over words, whose softmax has a hundred thousand classes."""

from __future__ import annotations

import collections
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from performers.app.errors import UserError
from studies.catalogue.models import CausalPerformer
from studies.catalogue.negatives import CatalogueLoss, FixedLoss, Loss, full_loss
from studies.parts import Part

_fixed = partial(FixedLoss, num_samples=2000, shared=True)
# Early in training items move fast, and old ones cost perplexity.
_sampled = partial(CatalogueLoss, update_every=3, cut_every=60)
LOSSES: dict[str, Callable[[Tensor, Tensor], Loss]] = {
    "full softmax": lambda items, frequency: full_loss,
    "uniform, 2,000 shared": lambda items, frequency: _fixed(torch.ones_like(frequency)),
    "unigram, 2,000 shared": lambda items, frequency: _fixed(frequency),
    "CatalogueSampler, 2,000 shared": lambda items, frequency: _sampled(items, 2000, shared=True),
    "CatalogueSampler, 20 a query": lambda items, frequency: _sampled(items, 20),
    "CatalogueSampler, 40 a query": lambda items, frequency: _sampled(items, 40),
}
"""Losses as functions of the items and their frequencies."""

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|[^\w\s]")
_LENGTH, _WIDTH, _BATCH = 64, 64, 8


class Words(NamedTuple):
    """Texts as numbers of words: all but every tenth, and the others."""

    training: Tensor
    validation: Tensor
    classes: int


def read_words(path: str, most: int) -> Words:
    """The words of a folder of texts or of a tar archive; the rarest are one class.

    Raises:
        UserError: It has fewer than two texts.
    """
    texts = dict(_texts(Path(path)))
    if len(texts) < 2:
        raise UserError(f"--texts {path} must have two texts or more, .txt; got {len(texts)}")
    split = {name: _WORD.findall(text) for name, text in sorted(texts.items())}
    frequency = collections.Counter(word for words in split.values() for word in words)
    numbers = {word: i for i, (word, _) in enumerate(frequency.most_common(most - 1))}
    rare = len(numbers)
    coded = [torch.tensor([numbers.get(word, rare) for word in words]) for words in split.values()]
    validation = coded[::10]
    training = [text for i, text in enumerate(coded) if i % 10]
    return Words(torch.cat(training), torch.cat(validation), rare + 1)


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    try:
        if path.is_dir():
            for file in path.glob("**/*.txt"):
                yield str(file), file.read_text(encoding="utf-8", errors="replace")
            return
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith(".txt") else None
                if content is not None:
                    yield member.name, content.read().decode("utf-8", errors="replace")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"--texts {path} is no folder or archive of texts: {error}") from error


def train_words(texts: Callable[[], Words], name: str, steps: int) -> Part:
    """Train a model of two layers and measure its perplexity with the full softmax.

    Biases begin at the logarithms of frequencies, for all losses.

    Returns:
        ``perplexity`` on 16 batches of texts that are not trained on, ``output_seconds`` (processor
        time of loss, its sampler and its gradients, a step), and ``step_seconds`` (of all).
    """
    words = texts()
    torch.manual_seed(0)
    frequency = words.training.bincount(minlength=words.classes) + 0.5
    bias = (frequency / frequency.sum()).log()
    model = CausalPerformer(words.classes, _WIDTH, 4, 2, _LENGTH, bias=bias)
    loss_of = LOSSES[name](model.items(), frequency)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    output, start = 0.0, time.process_time()
    for _ in range(steps):
        inputs, target = _passages(
            words.training, torch.randint(len(words.training) - _LENGTH - 1, (_BATCH,))
        )
        hidden, items = model(inputs).flatten(0, 1), model.items()
        # The gradients of the output layer by themselves, to be timed.
        queries, catalogue = (x.detach().requires_grad_() for x in (hidden, items))
        before = time.process_time()
        loss_of(queries, catalogue, target.flatten()).backward()
        output += time.process_time() - before
        optimizer.zero_grad()
        torch.autograd.backward((hidden, items), (queries.grad, catalogue.grad))
        optimizer.step()
    seconds = time.process_time() - start
    model.eval()
    losses = []
    with torch.no_grad():
        places = torch.linspace(0, len(words.validation) - _LENGTH - 1, 16 * _BATCH).long()
        for first in places.split(_BATCH):
            inputs, target = _passages(words.validation, first)
            losses.append(full_loss(model(inputs).flatten(0, 1), model.items(), target.flatten()))
    return {
        "classes": words.classes,
        "words": len(words.training),
        "queries": _BATCH * _LENGTH,
        "width": _WIDTH,
        "perplexity": torch.stack(losses).mean().exp().item(),
        "output_seconds": output / steps,
        "step_seconds": seconds / steps,
    }


def _passages(text: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    passages = text[first.unsqueeze(1) + torch.arange(_LENGTH + 1)]
    return passages[:, :-1], passages[:, 1:]
