"""``performers convert``: a pretrained Transformer becomes a Performer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from performers.benchmark.converted import SPEED, measure_speed
from performers.benchmark.converted_decode import measure_decoding
from performers.benchmark.converted_figure import conversion_figure
from performers.benchmark.groups import Sampling
from performers.benchmark.machine import describe
from performers.benchmark.workload import rising
from performers.cli.benchmark_run import integers, settings_of
from performers.cli.console import App, ProgressBars, note, one_line_errors, output
from performers.cli.convert_report import report_page, report_tables
from performers.convert.distillation.options import ConversionOptions, ConversionRecord
from performers.convert.distillation.pipeline import run_conversion
from performers.convert.interface.positions import extend_positions_, learned_positions
from performers.features import ESTIMATORS
from performers.features.softmax import Estimator
from performers.proteins.errors import Interrupted, UserError
from performers.proteins.figure_files import save_figure
from performers.proteins.folders import (
    prepare_output_folder,
    read_json,
    write_atomically,
    write_json,
)

app = App()

_DEFAULTS = ConversionOptions(model="", data="")
_RECORD, _PAGE, _FIGURE = "conversion.json", "conversion.md", "conversion.png"
# Positions that decoding needs beyond its contexts.
_STEPS = 16


@app.command()
def convert(
    model: Annotated[
        Path, typer.Argument(help="Folder of a pretrained transformers model, or a .gguf file.")
    ],
    data: Annotated[
        Path, typer.Option(help="Text or FASTA file; its end is held out for testing.")
    ],
    output_folder: Annotated[Path, typer.Option("--output", help="Folder of the new model.")],
    window: Annotated[
        int, typer.Option(min=0, help="Pairs this close are exact; 0: features for all pairs.")
    ] = _DEFAULTS.window or 0,
    sinks: Annotated[
        int | None, typer.Option(help="First keys that are exact; 4 for decoders, else 0.")
    ] = _DEFAULTS.sinks,
    key_list: Annotated[
        int,
        typer.Option(min=0, help="Keys a query meets exactly for their content; encoders only."),
    ] = _DEFAULTS.key_list,
    num_features: Annotated[
        int | None, typer.Option(help="Random features per head; about d ln d by default.")
    ] = _DEFAULTS.num_features,
    estimator: Annotated[
        str, typer.Option(help=f"One of {', '.join(ESTIMATORS)}.")
    ] = _DEFAULTS.estimator,
    layers: Annotated[
        str,
        typer.Option(
            help="Attention layers that become linear, with commas between, negative ones from "
            "the end; the others stay exact. All by default."
        ),
    ] = "",
    steps: Annotated[
        int, typer.Option(help="Steps of fine-tuning the whole model; 0 leaves it out.")
    ] = _DEFAULTS.steps,
    transfer_steps: Annotated[
        int | None,
        typer.Option(help="Steps of attention transfer before; 100 by default, 0 leaves it out."),
    ] = _DEFAULTS.transfer_steps,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens in an example; 1,024 for decoders, else 512, by default."),
    ] = _DEFAULTS.length,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = _DEFAULTS.batch_size,
    accumulation: Annotated[
        int, typer.Option(help="Batches per optimiser step.")
    ] = _DEFAULTS.accumulation,
    learning_rate: Annotated[
        float, typer.Option(help="Of fine-tuning, at its peak.")
    ] = _DEFAULTS.learning_rate,
    transfer_learning_rate: Annotated[
        float, typer.Option(help="Of attention transfer, at its start.")
    ] = _DEFAULTS.transfer_learning_rate,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank instead of all weights.")
    ] = _DEFAULTS.lora_rank,
    redraw_steps: Annotated[
        int | None,
        typer.Option(help="Draw features that are not trained anew every so many steps."),
    ] = _DEFAULTS.redraw_steps,
    loss: Annotated[
        str | None,
        typer.Option(
            help="logits, hidden, embedding or task; logits by default, embedding for a model "
            "without a head."
        ),
    ] = _DEFAULTS.loss,
    hidden_weight: Annotated[
        float,
        typer.Option(help="Of the hidden states' error, beside that of logits or embeddings."),
    ] = _DEFAULTS.hidden_weight,
    calibration: Annotated[
        int, typer.Option(help="Examples that features are fitted to.")
    ] = _DEFAULTS.calibration,
    test: Annotated[
        str, typer.Option(help="Examples to test on; with a point, their share of the file.")
    ] = str(_DEFAULTS.test),
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between measurements; a fifth by default.")
    ] = _DEFAULTS.eval_steps,
    save_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints.")
    ] = _DEFAULTS.save_steps,
    max_positions: Annotated[
        int | None,
        typer.Option(help="Give a model with a learned table of positions that many."),
    ] = _DEFAULTS.max_positions,
    lengths: Annotated[
        str, typer.Option(help="Tokens at which speed is measured, rising, with commas between.")
    ] = "512,2048,8192",
    speed: Annotated[bool, typer.Option(help="Measure speed against the original.")] = True,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too, in processes of its own.")
    ] = True,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")
    ] = _DEFAULTS.seed,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
) -> None:
    """Make a pretrained model's attention linear, fine-tune it, and measure what became of it."""
    with one_line_errors("convert", "--length or --batch-size"):
        sizes = integers("--lengths", lengths)
        settings_of(lambda: rising("lengths", sizes))
        options = settings_of(
            lambda: ConversionOptions(
                model=str(model),
                data=str(data),
                window=window or None,
                sinks=sinks,
                key_list=key_list,
                num_features=num_features,
                estimator=cast(Estimator, estimator),
                layers=integers("--layers", layers) if layers else None,
                length=length,
                calibration=calibration,
                test=_number("--test", test),
                transfer_steps=transfer_steps,
                steps=steps,
                batch_size=batch_size,
                accumulation=accumulation,
                learning_rate=learning_rate,
                transfer_learning_rate=transfer_learning_rate,
                lora_rank=lora_rank,
                redraw_steps=redraw_steps,
                loss=loss,
                hidden_weight=hidden_weight,
                eval_steps=eval_steps,
                save_steps=save_steps,
                max_positions=max_positions,
                seed=seed,
            )
        )
        for path, flag in ((model, "MODEL"), (data, "--data")):
            if not path.exists():
                raise UserError(f"{flag} {path} does not exist")
        prepare_output_folder(output_folder, resume=resume)
        record = ConversionRecord(saved=lambda record: _save(record, output_folder))
        try:
            with ProgressBars() as bars:
                _run(options, output_folder, record, resume, bars, sizes if speed else (), memory)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"interrupted; what is done is in {output_folder}, --resume goes on from there"
            ) from error
        for table in report_tables(record.content()):
            output.print(table.on_console())
            for line in table.notes:
                output.print(line, soft_wrap=True)
        output.print(f"report: {output_folder / _PAGE}", soft_wrap=True)


def _run(
    options: ConversionOptions,
    folder: Path,
    record: ConversionRecord,
    resume: bool,
    bars: ProgressBars,
    lengths: tuple[int, ...],
    memory: bool,
) -> None:
    def earlier(record: ConversionRecord) -> None:
        if resume and (folder / _RECORD).exists():
            record.resume(read_json(folder / _RECORD))
            note(f"{len(record.quality)} measurements kept from {folder / _RECORD}")
        record.machine = describe(torch.get_num_threads())

    loaded, converted = run_conversion(
        options, folder, record, resume=earlier, progress=bars.update
    )
    measured = sorted({row["length"] for row in record.speed})
    if lengths and measured != list(lengths):
        for model in (loaded.model, converted):
            if learned_positions(model) is not None:
                extend_positions_(model, lengths[-1] + _STEPS)
        record.speed = measure_speed(
            loaded.model,
            converted,
            lengths,
            sampling=Sampling(repeats=SPEED.repeats, min_time=SPEED.min_time, memory=memory),
            seed=options.seed,
            folders=(Path(options.model), folder),
            progress=bars.task("timing"),
        )
        if record.model["kind"] == "causal":
            record.decoding = measure_decoding(
                loaded.model,
                converted,
                lengths,
                tokens=_STEPS,
                seed=options.seed,
                progress=bars.task("decoding"),
            )
        record.saved(record)
    content: dict[str, Any] = record.content()
    save_figure(conversion_figure(content), folder / _FIGURE)
    write_atomically(folder / _PAGE, report_page(content).encode())


def _save(record: ConversionRecord, folder: Path) -> None:
    write_json(folder / _RECORD, record.content())


def _number(flag: str, text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise UserError(f"{flag} must be a number, got {text!r}") from error
