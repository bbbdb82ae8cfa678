"""``performers study``: whole comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from performers.cli.console import App, ProgressBars, note, one_line_errors, output
from performers.proteins.errors import UserError
from performers.proteins.folders import prepare_output_folder
from performers.study.data import corpus_data, embedded_data
from performers.study.presets import PRESETS
from performers.study.study import run_study

app = App(no_args_is_help=True, help="Compare attentions, from data to a page.")


@app.callback()
def main() -> None:
    """Compare attentions, from data to a page."""


@app.command()
def proteins(
    output_folder: Annotated[Path, typer.Option("--output", help="Folder of the study.")],
    preset: Annotated[str, typer.Option(help=f"Its size: {', '.join(PRESETS)}.")] = "minutes",
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of performers data; the embedded families without one, which only the "
            "preset minutes takes."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each compared model.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, from 0.")] = None,
    attentions: Annotated[
        list[str] | None,
        typer.Option("--attention", help="Only these of the comparison (repeatable)."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Threads of torch; its own choice by default."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the study in --output.")
    ] = False,
) -> None:
    """Train every attention on the same proteins and compare them: accuracy, cost, what they learn.

    Safe to kill: the same command with --resume goes on from the last checkpoint. Runs under
    torchrun or accelerate too.
    """
    with one_line_errors():
        if preset not in PRESETS:
            raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        chosen = PRESETS[preset]
        if steps is not None:
            share = steps / chosen.training.steps
            training = replace(
                chosen.training,
                steps=steps,
                eval_steps=max(1, round((chosen.training.eval_steps or steps) * share)),
                warmup_steps=max(1, steps // 10),
                # A shorter run has a checkpoint on its way too.
                save_steps=min(chosen.training.save_steps or steps, max(1, steps // 2)),
            )
            chosen = replace(chosen, training=training)
        if seeds is not None:
            chosen = replace(chosen, seeds=tuple(range(seeds)))
        if attentions:
            unknown = set(attentions) - {*chosen.masked, *chosen.causal}
            if unknown:
                raise UserError(
                    f"--attention must be of {', '.join(chosen.masked)}, got {sorted(unknown)[0]!r}"
                )
            chosen = replace(
                chosen,
                masked=tuple(name for name in chosen.masked if name in attentions),
                causal=tuple(name for name in chosen.causal if name in attentions),
            )
        if data is None and preset != "minutes":
            raise UserError(
                f"--preset {preset} needs --data, a folder of performers data swissprot; only "
                "minutes runs on the embedded proteins"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        prepare_output_folder(output_folder, resume=resume)
        proteins = (
            embedded_data(chosen.scored) if data is None else corpus_data(data, chosen.scored)
        )
        with ProgressBars() as bars:
            page = run_study(output_folder, proteins, chosen, name=preset, report=bars.update)
        note(f"tables: {output_folder / 'tables.md'}")
        output.print(f"report: {page}", soft_wrap=True)
