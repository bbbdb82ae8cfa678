"""Running, measuring and writing of ``performers convert``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from performers.app.conversion import ConversionOptions
from performers.app.errors import Interrupted, UserError
from performers.app.figures import save_figure
from performers.app.files import read_json, write_atomically
from performers.benchmark.cases.convert import SPEED, measure_decoding, measure_speed
from performers.benchmark.machine import describe
from performers.benchmark.plot import conversion_figure
from performers.cli.console import ProgressBars, note, output, table
from performers.cli.convert import ConversionFiles
from performers.cli.convert_report import model_card, report_page, report_tables
from performers.convert.distillation.pipeline import ConversionRun
from performers.convert.distillation.results import ConversionRecord
from performers.convert.interface.positions import extend_positions_, learned_positions
from performers.training.environment import quiet_transformers

_RECORD, _PAGE, _FIGURE = "conversion.json", "conversion.md", "conversion.png"
_CARD = "README.md"
# Positions that decoding needs beyond its contexts.
_STEPS = 16


def convert_and_measure(options: ConversionOptions, files: ConversionFiles) -> None:
    """Convert a model into a folder, or resume a run in it, and print the results.

    Raises:
        Interrupted: Ctrl-C; finished stages are in the folder.
        UserError: The model, the text or an option cannot be used.
    """
    folder = files.output_folder
    record = ConversionRecord(folder / _RECORD)
    try:
        with ProgressBars() as bars:
            _run(options, files, record, bars)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted; what is done is in {folder}, --resume goes on from there"
        ) from error
    for title, headings, rows, notes in report_tables(record.content()):
        output.print(table(headings, rows, title=title))
        for line in notes:
            output.print(line, soft_wrap=True)
    output.print(f"report: {folder / _PAGE}", soft_wrap=True)


def _run(
    options: ConversionOptions, files: ConversionFiles, record: ConversionRecord, bars: ProgressBars
) -> None:
    folder, lengths = files.output_folder, files.lengths if files.speed else ()
    with quiet_transformers():
        run = ConversionRun(options, folder, record, bars.update)
        if files.resume and record.file.exists():
            record.resume(read_json(record.file))
            note(f"{len(record.quality)} measurements kept from {record.file}")
        record.machine = describe(torch.get_num_threads())
        original, converted = run.original, run.run()
    measured = sorted({row["length"] for row in record.speed})
    if lengths and measured != list(lengths):
        for model in (original, converted):
            if learned_positions(model) is not None:
                extend_positions_(model, lengths[-1] + _STEPS)
        record.speed = measure_speed(
            original,
            converted,
            lengths,
            sampling=replace(SPEED, memory=files.memory),
            seed=options.seed,
            folders=(run.source, folder),
            progress=bars.task("timing"),
        )
        if record.model["kind"] == "causal":
            record.decoding = measure_decoding(
                original,
                converted,
                lengths,
                tokens=_STEPS,
                seed=options.seed,
                progress=bars.task("decoding"),
            )
        record.save()
    content: dict[str, Any] = record.content()
    save_figure(conversion_figure(content), folder / _FIGURE)
    write_atomically(folder / _PAGE, report_page(content).encode())
    write_atomically(folder / _CARD, model_card(content).encode())
