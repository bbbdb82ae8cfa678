"""``python -m studies.catalogue``: softmax over many items by sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from performers.app.options import OptionError, Options, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once

SECTIONS = ("quality", "recommendation", "words", "million")

app = App()


@dataclass(frozen=True, kw_only=True)
class CatalogueOptions(Options):
    """Options of the study."""

    output_folder: Path = option("Folder of results.json.", flag="--output")
    resume: bool = option("Skip the parts that results.json has.", False)
    quick: bool = option("A size of seconds, to see that it runs.", False)
    sections: tuple[str, ...] = option(
        f"Some of {', '.join(SECTIONS)}.", SECTIONS, choices=SECTIONS
    )
    packages: str | None = option(
        "A Debian package index; by default that of apt-cache dumpavail.", None, path=True
    )
    ratings: str | None = option(
        "MovieLens-100k as the wheel of recbole or the file ml-100k.inter in it.", None, path=True
    )
    texts: str | None = option("A folder or tar archive of texts (.txt).", None, path=True)
    seeds: int = option("Number of seeds, from 0.", 3, at_least=1)
    quality_steps: tuple[int, ...] = option(
        "Training steps on dependencies after which samplers are measured, rising.",
        (1200, 3000),
        rising=True,
    )
    rating_seeds: int = option(
        "Number of seeds of the section recommendation, from 0.", 10, at_least=1
    )
    epochs: int = option("Training passes over the ratings.", 40, at_least=1)
    words_steps: int = option("Training steps on words.", 1000, at_least=1)
    classes: int = option("Most different words.", 100_000, at_least=2)
    items: int = option("Items of the section million.", 1_000_000, at_least=64)

    def __post_init__(self) -> None:
        """Check that the data of the sections are there.

        Raises:
            OptionError: A section needs a file.
        """
        super().__post_init__()
        for section, name in (("recommendation", "ratings"), ("words", "texts")):
            if section in self.sections and getattr(self, name) is None:
                raise OptionError(f"--{name} is needed for the section {section}")


@app.command(extra="benchmark")
def catalogue(options: CatalogueOptions) -> None:
    """Quality of samplers, recommendation, words, and a million items."""
    import torch

    from studies.catalogue.report import tables
    from studies.parts import run_parts

    torch.set_num_threads(1)
    names = (
        "seeds", "quality_steps", "rating_seeds", "epochs", "words_steps", "classes", "items"
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    if options.quick:
        settings |= {"seeds": 1, "quality_steps": [2], "rating_seeds": 1, "epochs": 1}
        settings |= {"words_steps": 2, "items": 4096}
    parts = _parts(options, settings)
    run_parts(options.output_folder, settings, parts, tables, resume=options.resume)


def _parts(
    options: CatalogueOptions, settings: dict[str, Any]
) -> dict[str, Callable[[], dict[str, object]]]:
    from studies.catalogue import million, quality, recommendation, words

    parts: dict[str, Callable[[], dict[str, object]]] = {}
    # Read when a part needs them, once.
    index = cache(partial(quality.read_index, options.packages))
    texts = cache(partial(words.read_words, str(options.texts), settings["classes"]))
    seeds = range(settings["seeds"])
    if "quality" in options.sections:
        for steps in settings["quality_steps"]:
            for seed in seeds:
                parts[f"quality, {steps:,} steps, seed {seed}"] = partial(
                    quality.measure_quality, index, steps, seed
                )
    if "recommendation" in options.sections:
        rows, count = recommendation.read_sequences(str(options.ratings))
        for seed in range(settings["rating_seeds"]):
            for name in recommendation.LOSSES:
                parts[f"recommendation, {name}, seed {seed}"] = partial(
                    recommendation.train_and_rank, rows, count, name, settings["epochs"], seed
                )
    if "words" in options.sections:
        for name in words.LOSSES:
            parts[f"words, {name}"] = partial(
                words.train_words, texts, name, settings["words_steps"], seed=0
            )
    if "million" in options.sections:
        for kind in million.KINDS:
            parts[f"million, {kind}"] = partial(million.measure_million, kind, settings["items"])
    return parts


if __name__ == "__main__":
    end_at_once()
    app()
