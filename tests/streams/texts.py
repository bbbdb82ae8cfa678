"""Small texts, options and runs that the tests of streams share."""

import random

from performers.streams.training import train_texts
from performers.training.options import TrainingOptions

SMALL = {
    "objective": "clm",
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_features": 8,
    "max_length": 16,
    "batch_tokens": 48,
    "steps": 8,
    "redraw_steps": 3,
    "save_steps": 2,
    "log_steps": 1,
    "eval_steps": 8,
    "dropout": 0.1,
}


def options(**changes):
    return TrainingOptions(**{**SMALL, **changes})


def write_texts(folder, sizes=(100, 40, 75, 33, 17, 120), seed=0):
    """Files of random words; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    for number, size in enumerate(sizes):
        words = " ".join(source.choices(("one", "two", "three", "four\n"), k=size))
        (folder / f"text{number}.txt").write_text(words[:size])
    return folder


def train(texts, output, *, resume=False, progress=None, announce=lambda line: None, **changes):
    extra = {
        name: changes.pop(name) for name in ("tokenizer", "validation", "start") if name in changes
    }
    return train_texts(
        [texts],
        output,
        options(**changes),
        resume=resume,
        progress=progress,
        announce=announce,
        **extra,
    )
