"""``python -m studies.images``: pictures as rows of 12,288 values, at equal time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from performers.app.options import argument, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import Measures, StudyOptions, extent, run_parts

app = App()


@dataclass(frozen=True, kw_only=True)
class ImagesOptions(StudyOptions):
    """Options of the study."""

    folder: str = argument(
        "Folder of photographs, or .npy or .npz files of ImageNet64.",
        path=True,
        changes_result=False,
    )
    quick: bool = extent("A size of seconds, to see that it runs.", False)
    seconds: float = option("Processor seconds of training for each attention.", 480.0, above=0)
    scored: int = option("Test pictures.", 100, at_least=1)
    score_seconds: float = option(
        "Processor seconds after which a model is scored on no further picture.", 60.0, above=0
    )
    completions: int = option("Pictures to complete.", 4, at_least=1)
    learning_rate: float = option("Peak learning rate of all models.", 1e-2, above=0)
    seed: int = option("Random seed.", 0, at_least=0)


@app.command(extra="proteins")
def images(options: ImagesOptions) -> None:
    """Train Performers, sparse patterns and exact attention on pixels; complete lower halves."""
    import torch

    from performers.app.figures import save_figure
    from performers.app.files import prepare_output_folder
    from performers.cli.console import note
    from performers.streams.images import (
        CentreCrops,
        RandomCrops,
        least_side,
        split_pictures,
    )
    from performers.streams.pictures import open_pictures
    from studies.images import models, report
    from studies.images.codecs import measure_codecs
    from studies.images.completions import complete_best
    from studies.images.training import train_and_score

    # Counted is the processor time of one thread.
    torch.set_num_threads(1)
    size = models.Size(**options.settings())
    if options.quick:
        size = replace(size, **models.QUICK)
    pictures = open_pictures(Path(options.folder), size=size.size, least=least_side(size.size))
    output = prepare_output_folder(options.output_folder, resume=options.resume)
    note(pictures.summary())
    trained, scored = split_pictures(pictures, size.scored, size.seed)
    tests, centres = (CentreCrops(pictures, x, size=size.size) for x in (scored, trained))
    crops = RandomCrops(pictures, trained, size=size.size, seed=size.seed, places=models.MOST_STEPS)
    parts: Measures = {report.FLOORS: partial(measure_codecs, centres, tests)}
    folders: dict[str, Path] = {}
    for number, (name, chosen) in enumerate(models.contestants(size).items()):
        folders[name] = output / "runs" / str(number)
        parts[name] = partial(train_and_score, name, chosen, size, crops, tests, folders[name])
    parts[report.COMPLETIONS] = partial(complete_best, folders, tests, size, output)
    settings = {**asdict(size), "pictures": pictures.counts, "sha256": pictures.fingerprint()}
    done = run_parts(options, parts, partial(report.tables, size), settings=settings)
    save_figure(report.curves(size, done), output / "curves.png")


if __name__ == "__main__":
    end_at_once()
    app()
