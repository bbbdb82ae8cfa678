"""``python -m studies.proteins``: models with different attentions, trained alike and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from performers.app.options import OptionError, Options, option
from performers.cli.commands import App
from performers.cli.console import ProgressBars, output
from performers.cli.interrupts import end_at_once
from performers.proteins.folders import prepare_output_folder

PRESETS = ("minutes", "hours", "cluster")

app = App()


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """Options of the study."""

    output_folder: Path = option("Folder of the study.", flag="--output")
    preset: str = option(f"Its size: {', '.join(PRESETS)}.", "minutes", choices=PRESETS)
    data: Path | None = option(
        "A folder of performers data; the embedded families without one, which only the preset "
        "minutes takes.",
        None,
    )
    steps: int | None = option("Training steps of each compared model.", None, at_least=1)
    seeds: int | None = option("How many seeds, from 0.", None, at_least=1)
    attentions: list[str] | None = option(
        "Only these of the comparison (repeatable).", None, flag="--attention"
    )
    threads: int | None = option(
        "Threads of torch; torch's default otherwise.", None, at_least=1, at_most=1024
    )
    resume: bool = option("Continue the study in --output.", False)


@app.command()
def proteins(options: StudyOptions) -> None:
    """Train every attention on the same proteins and compare them: accuracy, cost, what they learn.

    Safe to kill: the same command with --resume goes on from the last checkpoint. Runs under
    torchrun or accelerate too.
    """
    import torch

    from studies.proteins import presets
    from studies.proteins.data import corpus_data, embedded_data
    from studies.proteins.runs import run_study

    chosen = presets.PRESETS[options.preset]
    if options.steps is not None:
        share = options.steps / chosen.training.steps
        training = replace(
            chosen.training,
            steps=options.steps,
            eval_steps=max(1, round((chosen.training.eval_steps or options.steps) * share)),
            warmup_steps=max(1, options.steps // 10),
            # A shorter run has a checkpoint on its way too.
            save_steps=min(chosen.training.save_steps or options.steps, max(1, options.steps // 2)),
        )
        chosen = replace(chosen, training=training)
    if options.seeds is not None:
        chosen = replace(chosen, seeds=tuple(range(options.seeds)))
    if wanted := options.attentions:
        unknown = set(wanted) - {*chosen.masked, *chosen.causal}
        if unknown:
            raise OptionError(
                f"--attention must be of {', '.join(chosen.masked)}, got {sorted(unknown)[0]!r}"
            )
        masked, causal = (
            tuple(name for name in names if name in wanted)
            for names in (chosen.masked, chosen.causal)
        )
        chosen = replace(chosen, masked=masked, causal=causal)
    if options.data is None and options.preset != "minutes":
        raise OptionError(
            f"--preset {options.preset} needs --data, a folder of performers data swissprot; only "
            "minutes runs on the embedded proteins"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = prepare_output_folder(options.output_folder, resume=options.resume)
    if options.data is None:
        data = embedded_data(chosen.scored)
    else:
        data = corpus_data(options.data, chosen.scored)
    with ProgressBars() as bars:
        page = run_study(folder, data, chosen, name=options.preset, report=bars.update)
    output.print(f"report: {page}", soft_wrap=True)


if __name__ == "__main__":
    end_at_once()
    app()
