"""``python -m studies.catalogue``: softmax over many items by sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256

from performers.app.options import OptionError, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import Measures, StudyOptions, extent, fingerprint, run_parts

SECTIONS = ("quality", "recommendation", "words", "million")

app = App()


@dataclass(frozen=True, kw_only=True)
class CatalogueOptions(StudyOptions):
    """Options of the study."""

    quick: bool = extent("A size of seconds, to see that it runs.", False)
    sections: tuple[str, ...] = extent(
        f"Some of {', '.join(SECTIONS)}.", SECTIONS, choices=SECTIONS
    )
    packages: str | None = extent(
        "A Debian package index; by default that of apt-cache dumpavail.", None, path=True
    )
    ratings: str | None = extent(
        "MovieLens-100k as the wheel of recbole or the file ml-100k.inter in it.", None, path=True
    )
    texts: str | None = extent("A folder or tar archive of texts (.txt).", None, path=True)
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
        """Check that the data of the sections are there."""
        super().__post_init__()
        for section, name in (("recommendation", "ratings"), ("words", "texts")):
            if section in self.sections and getattr(self, name) is None:
                raise OptionError(f"--{name} is needed for the section {section}")


@app.command(extra="benchmark")
def catalogue(options: CatalogueOptions) -> None:
    """Quality of samplers, recommendation, words, and a million items."""
    import torch

    from studies.catalogue import million, quality, recommendation, words
    from studies.catalogue.report import tables
    from studies.debian import read_index

    torch.set_num_threads(1)
    if options.quick:
        options = replace(
            options, seeds=1, quality_steps=(2,), rating_seeds=1, epochs=1, words_steps=2,
            items=4096,
        )  # fmt: skip
    parts: Measures = {}
    data: dict[str, str] = {}
    if "quality" in options.sections:
        index = read_index(options.packages)
        data["quality"] = sha256(index.encode()).hexdigest()
        parts |= {
            f"quality, {steps:,} steps, seed {seed}": partial(
                quality.measure_quality, index, steps, seed
            )
            for steps in options.quality_steps
            for seed in range(options.seeds)
        }
    if "recommendation" in options.sections:
        rows, count = recommendation.read_sequences(str(options.ratings))
        data["recommendation"] = fingerprint(str(options.ratings))
        parts |= {
            f"recommendation, {name}, seed {seed}": partial(
                recommendation.train_and_rank, rows, count, name, options.epochs, seed
            )
            for seed in range(options.rating_seeds)
            for name in recommendation.LOSSES
        }
    if "words" in options.sections:
        # Read when a part needs them, once.
        texts = cache(partial(words.read_words, str(options.texts), options.classes))
        data["words"] = fingerprint(str(options.texts))
        for name in words.LOSSES:
            parts[f"words, {name}"] = partial(words.train_words, texts, name, options.words_steps)
    if "million" in options.sections:
        for kind in million.KINDS:
            parts[f"million, {kind}"] = partial(million.measure_million, kind, options.items)
    run_parts(options, parts, tables, data=data)


if __name__ == "__main__":
    end_at_once()
    app()
