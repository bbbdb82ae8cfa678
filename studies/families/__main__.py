"""``python -m studies.families``: proteins read with their relatives in one context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from performers.app.options import option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import Measures, StudyOptions, extent, run_parts

app = App()
# Residues of a protein that the included model is scored on.
_LONGEST_INCLUDED = 510


@dataclass(frozen=True, kw_only=True)
class FamiliesOptions(StudyOptions):
    """Options of the study."""

    corpus: Path | None = option("Folder of performers data, for its held-out clusters.", None)
    included: Path | None = option(
        "Folder of the corpus of the models in the package, to score that which reads relatives on "
        "the clusters it holds out.",
        None,
        changes_result=False,
    )
    relatives: tuple[int, ...] = option("Numbers of relatives, rising.", (1, 5, 30), rising=True)
    scored: int = option("Held-out proteins to score on.", 60, at_least=1)
    longest: int = option("Most residues of a protein of the corpus.", 256, at_least=3)
    copy_steps: int = option("Training steps on synthetic families.", 200, at_least=1)
    family_steps: int = option("Training steps on families of the corpus.", 200, at_least=1)
    long_steps: int = option("Training steps of the longest training on them.", 600, at_least=1)
    row_tokens: int = option("Most tokens of a row of the corpus to train on.", 1024, at_least=8)
    batch_tokens: int = option("Tokens of a batch.", 2048, at_least=1)
    hidden_size: int = option("Width of the models.", 64, at_least=8)
    contexts: tuple[int, ...] = extent(
        "Tokens of rows whose time and memory are measured, multiples of 256, rising.",
        (8192, 16384, 65536),
        rising=True,
    )
    seeds: int = option("Trainings of each model, from different weights.", 3, at_least=1)
    seed: int = option("First random seed.", 0, at_least=0)
    threads: int = option("Threads of torch.", 1, at_least=1)


@app.command()
def families(options: FamiliesOptions) -> None:
    """Accuracy of hidden residues from relatives: by alignment, and by models."""
    import torch

    from performers.proteins.corpus import Corpus
    from studies.families.ceiling import measure_ceiling
    from studies.families.experiments import (
        MOST_EXACT,
        REAL,
        contexts,
        copying,
        copying_scored,
        included,
        real_families,
    )
    from studies.families.report import tables
    from studies.families.scored import corpus_split, draw_scored, embedded_families
    from studies.families.training import CONTESTANTS, Shape

    torch.set_num_threads(options.threads)
    counts = (0, *options.relatives)
    draw = partial(
        draw_scored, count=options.scored, relatives=counts[-1], longest=options.longest,
        seed=options.seed,
    )  # fmt: skip
    settings = options.settings()
    sets = {"embedded": draw(embedded_families())}
    if options.corpus is not None:
        corpus = Corpus(options.corpus)
        sets["corpus"] = draw(corpus_split(corpus, "ood"))
        # Its content, wherever it is.
        settings["corpus"] = {x: corpus.split(x).fingerprint() for x in ("train", "ood")}
    parts: Measures = {
        f"ceiling, {name}": partial(measure_ceiling, scored, counts)
        for name, scored in sets.items()
    }
    shape = Shape(
        hidden_size=options.hidden_size,
        batch_tokens=options.batch_tokens,
        steps=options.copy_steps,
    )
    copied = copying_scored(4 * options.scored, options.seed)
    weights = options.output_folder / "weights"
    seeds = range(options.seed, options.seed + options.seeds)
    parts["ceiling, synthetic"] = partial(measure_ceiling, copied, (0, 1))
    for seed in seeds:
        for name in CONTESTANTS:
            measure = partial(copying, name, shape, copied, seed, weights)
            parts[f"copying, {name}, seed {seed}"] = measure
    if options.corpus is not None:
        train = partial(
            real_families,
            proteins=corpus_split(corpus, "train"),
            scored=sets["corpus"],
            relatives=counts,
            max_length=options.row_tokens,
            folder=weights,
        )
        long, short = (replace(shape, steps=x) for x in (options.long_steps, options.family_steps))
        for seed in seeds:
            for name in REAL:
                parts[f"families, {name}, seed {seed}"] = partial(train, name, short, seed)
        name, seed = REAL[0], options.seed
        parts[f"families, {name}, {long.steps:,} steps, seed {seed}"] = partial(
            train, name, long, seed
        )
    for name in REAL[:2]:
        for tokens in options.contexts:
            if name != "exact" or tokens <= MOST_EXACT:
                parts[f"contexts, {name}, {tokens:,} tokens"] = partial(
                    contexts, name, shape, tokens, options.seed
                )
    data = {}
    if options.included is not None:
        split = Corpus(options.included).split("ood")
        data["included"] = split.fingerprint()
        held_out = corpus_split(Corpus(options.included), "ood")
        for k in range(2, len(counts) + 1):
            most = counts[k - 1]
            drawn = draw_scored(held_out, 2 * options.scored, most, _LONGEST_INCLUDED, options.seed)
            name = f"included, with {most} relatives"
            parts[name] = partial(included, drawn, counts[:k])
    run_parts(options, parts, tables, settings=settings, data=data)


if __name__ == "__main__":
    end_at_once()
    app()
