"""``python -m studies.text``: attentions trained on novels for equal time, and redraws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from performers.app.errors import UserError
from performers.app.options import argument, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import StudyOptions, extent, run_parts

app = App()


@dataclass(frozen=True, kw_only=True)
class TextOptions(StudyOptions):
    """Options of the study."""

    novels: str = argument("Folder of texts to train on.", path=True, changes_result=False)
    unseen: str = extent("Folder of texts by an author who is not among them.", path=True)
    seconds: float = option("Processor seconds of training of each contestant.", 480.0, above=0)
    redraw_seconds: float = option("The same of each model of the redraws.", 300.0, above=0)
    contexts: int = option("Contexts of 8,192 bytes of the unseen author.", 48, at_least=1)
    only: tuple[str, ...] | None = extent(
        "Parts to measure, by their names, with commas between.", None
    )
    seed: int = option("Random seed.", 0)


@app.command()
def text(options: TextOptions) -> None:
    """Compare attentions at equal time on texts of an unseen author, and schedules of redraws."""
    import torch

    from performers.streams.text import find_texts
    from studies.text.contestants import Study, tables

    torch.set_num_threads(1)
    novels, unseen = (find_texts([Path(x)]) for x in (options.novels, options.unseen))
    both = {file.name for file in novels} & {file.name for file in unseen}
    if both:
        raise UserError(f"--unseen has files of NOVELS, such as {min(both)}; give another author")
    study = Study(options, novels, unseen)
    parts = study.parts()
    unknown = sorted(set(options.only or ()) - set(parts))
    if unknown:
        raise UserError(f"--only has no part {unknown[0]!r}; they are {', '.join(parts)}")
    chosen = {name: parts[name] for name in parts if name in (options.only or parts)}
    run_parts(options, chosen, tables, settings=study.settings())


if __name__ == "__main__":
    end_at_once()
    app()
