"""``performers convert``: a pretrained Transformer becomes a Performer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from performers.app.conversion import ConversionOptions
from performers.app.errors import UserError
from performers.app.files import prepare_output_folder
from performers.app.options import Options, option
from performers.app.processes import process_count


@dataclass(frozen=True, kw_only=True)
class ConversionFiles(Options):
    """Folder of a conversion, and the measurements of its speed."""

    output_folder: Path = option("Folder of the new model.", flag="--output")
    resume: bool = option("Continue the run in --output.", False)
    lengths: tuple[int, ...] = option(
        "Tokens at which speed is measured, rising, with commas between.",
        (512, 2048, 8192),
        rising=True,
    )
    speed: bool = option("Measure speed against the original.", True)
    memory: bool = option("Measure peak memory too, in processes of its own.", True)


def convert(options: ConversionOptions, files: ConversionFiles) -> None:
    """Make a pretrained model's attention linear, fine-tune it, and measure what became of it."""
    from performers.convert.hub import is_hub_name

    if process_count() > 1:
        raise UserError(
            "performers convert runs in one process; in those of torchrun a program of yours "
            "distils a converted model, with performers.convert.distill(..., sequence_parallel=N)"
        )
    if not Path(options.data).exists():
        raise UserError(f"--data {options.data} does not exist")
    if not (Path(options.model).exists() or is_hub_name(options.model)):
        raise UserError(f"MODEL {options.model} does not exist")
    prepare_output_folder(files.output_folder, resume=files.resume)
    from performers.cli.convert_run import convert_and_measure

    convert_and_measure(options, files)
