"""``performers study``: whole comparisons."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from performers.app.files import prepare_output_folder
from performers.app.options import OptionError, Options, option
from performers.cli.commands import App
from performers.cli.console import ProgressBars, note, output

PRESETS = ("minutes", "hours", "cluster")

app = App(no_args_is_help=True, help="Compare attentions, from data to a page.")


@app.callback()
def main() -> None:
    """Compare attentions, from data to a page."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """Options of ``performers study proteins``."""

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
        "Threads of torch; its own choice by default.", None, at_least=1, at_most=1024
    )
    resume: bool = option("Continue the study in --output.", False)


@app.command()
def proteins(options: StudyOptions) -> None:
    """Train every attention on the same proteins and compare them: accuracy, cost, what they learn.

    Safe to kill: the same command with --resume goes on from the last checkpoint. Runs under
    torchrun or accelerate too.
    """
    import torch

    from performers.study import presets
    from performers.study.data import corpus_data, embedded_data
    from performers.study.study import run_study

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
    if options.attentions:
        unknown = set(options.attentions) - {*chosen.masked, *chosen.causal}
        if unknown:
            raise OptionError(
                f"--attention must be of {', '.join(chosen.masked)}, got {sorted(unknown)[0]!r}"
            )
        chosen = replace(
            chosen,
            masked=tuple(name for name in chosen.masked if name in options.attentions),
            causal=tuple(name for name in chosen.causal if name in options.attentions),
        )
    if options.data is None and options.preset != "minutes":
        raise OptionError(
            f"--preset {options.preset} needs --data, a folder of performers data swissprot; only "
            "minutes runs on the embedded proteins"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = prepare_output_folder(options.output_folder, resume=options.resume)
    if options.data is None:
        proteins = embedded_data(chosen.scored)
    else:
        proteins = corpus_data(options.data, chosen.scored)
    with ProgressBars() as bars:
        page = run_study(folder, proteins, chosen, name=options.preset, report=bars.update)
    note(f"tables: {folder / 'tables.md'}")
    output.print(f"report: {page}", soft_wrap=True)
