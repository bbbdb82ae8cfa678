"""``python -m studies.families``: proteins read with their relatives in one context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from performers.app.options import Options, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once

app = App()


@dataclass(frozen=True, kw_only=True)
class FamiliesOptions(Options):
    """Options of the study."""

    output_folder: Path = option("Folder of results.json.", flag="--output")
    corpus: Path | None = option("Folder of performers data, for its held-out clusters.", None)
    resume: bool = option("Skip the parts that results.json has.", False)
    relatives: tuple[int, ...] = option("Numbers of relatives, rising.", (1, 5, 30), rising=True)
    scored: int = option("Held-out proteins to score on.", 200, at_least=1)
    longest: int = option("Most residues of a protein of the corpus.", 256, at_least=3)
    seed: int = option("Random seed.", 0, at_least=0)
    threads: int = option("Threads of torch.", 1, at_least=1)


@app.command()
def families(options: FamiliesOptions) -> None:
    """Accuracy of hidden residues from relatives: by alignment, and by models."""
    import torch

    from performers.proteins.corpus import Corpus
    from studies.families.ceiling import measure_ceiling
    from studies.families.report import tables
    from studies.families.scored import corpus_split, draw_scored, embedded_families
    from studies.parts import run_parts

    torch.set_num_threads(options.threads)
    counts = (0, *options.relatives)
    draw = partial(
        draw_scored, count=options.scored, relatives=counts[-1], longest=options.longest,
        seed=options.seed,
    )  # fmt: skip
    sets = {"embedded": draw(embedded_families())}
    if options.corpus is not None:
        corpus = Corpus(options.corpus)
        sets["corpus"] = draw(corpus_split(corpus, "ood"))
    parts = {
        f"ceiling, {name}": partial(measure_ceiling, scored, counts)
        for name, scored in sets.items()
    }
    settings = {
        "relatives": list(options.relatives),
        "scored": options.scored,
        "longest": options.longest,
        "seed": options.seed,
        "threads": options.threads,
    }
    run_parts(options.output_folder, settings, parts, tables, resume=options.resume)


if __name__ == "__main__":
    end_at_once()
    app()
