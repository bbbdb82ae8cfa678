"""``performers benchmark``: time, memory and accuracy of attention, training steps, decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from performers.app.files import prepare_output_folder
from performers.benchmark.settings import AttentionSettings, DecodeSettings, ModelSettings
from performers.cli.benchmark_accuracy import ResultFiles, accuracy
from performers.cli.commands import App
from performers.cli.console import note

if TYPE_CHECKING:
    from performers.benchmark.results import Results

app = App(
    no_args_is_help=True,
    help="Time and memory of attention, of training steps and of decoding, on this machine; "
    "accuracy of attention through random features.",
)
app.command(extra="benchmark", lower="--length, --kernel-length or --passages")(accuracy)


@app.command(extra="benchmark", lower="--lengths or --batch")
def attention(files: ResultFiles, settings: AttentionSettings) -> None:
    """Attention: ours, torch's exact attention, and other libraries that are installed."""
    from performers.benchmark.attention import attention_results, run_attention

    _measure(files, settings, attention_results, run_attention)


@app.command(extra="benchmark", lower="--lengths or --batch")
def model(files: ResultFiles, settings: ModelSettings) -> None:
    """Training steps: forward, loss, backward and Adam, against attention that does nothing."""
    from performers.benchmark.model import model_results, run_model

    _measure(files, settings, model_results, run_model)


@app.command(extra="benchmark", lower="--contexts or --batch")
def decode(files: ResultFiles, settings: DecodeSettings) -> None:
    """Decoding: time per token and bytes of state, against a cache of keys and values."""
    from performers.benchmark.decode import decode_results, run_decode

    _measure(files, settings, decode_results, run_decode)


def _measure(
    files: ResultFiles,
    settings: Any,
    empty: Callable[[Any], Results],
    run: Callable[..., None],
) -> None:
    from performers.cli.benchmark_run import measure_and_write

    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    results = empty(settings)
    for name, reason in results.notes.get("not_measured", {}).items():
        note(f"{name}: {reason}")
    measure_and_write(results, folder, files.resume, partial(run, settings, results))
