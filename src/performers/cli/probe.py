"""``performers probe``: what a model's embeddings tell of labelled proteins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.cli.console import ProgressBars, note, one_line_errors, output
from performers.cli.inputs import ModelAndFasta, model_and_fasta, protein_records
from performers.proteins.embedding import POOLINGS, check_pooling
from performers.proteins.errors import UserError
from performers.proteins.figure_files import save_figure
from performers.proteins.folders import prepare_output_folder, write_json
from performers.proteins.model_folder import load_model
from performers.proteins.probe import ProbeOptions, run_probe
from performers.proteins.probe_features import FEATURES, feature_notes, probe_features
from performers.proteins.probe_figure import METRICS, probe_figure
from performers.proteins.probe_fit import require_scikit_learn
from performers.proteins.probe_labels import read_groups, read_labels
from performers.proteins.probe_task import build_task

_DEFAULTS = ProbeOptions()


def probe(
    paths: ModelAndFasta,
    output_folder: Annotated[Path, typer.Option("--output", help="A new folder.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Table: name, tab, labels with commas between, and perhaps a tab and the group. "
            "By default labels=A,B in the FASTA headers."
        ),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            help="Clusters of related sequences, the *_cluster.tsv of mmseqs2. By default the "
            "groups in --labels, or family=NAME in the FASTA headers. Not with --split random."
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="groups: none is both trained and tested on; random: relatives of the test "
            "sequences are trained on."
        ),
    ] = _DEFAULTS.split,
    features: Annotated[str, typer.Option(help="What to compare, with commas between.")] = ",".join(
        FEATURES
    ),
    pooling: Annotated[
        str, typer.Option(help="Of embeddings: mean, or mean-sd; see performers embed.")
    ] = POOLINGS[0],
    repeats: Annotated[int, typer.Option(help="Splits.")] = _DEFAULTS.repeats,
    min_count: Annotated[
        int,
        typer.Option(
            help="Labels with or without fewer proteins in a part of a split are dropped."
        ),
    ] = _DEFAULTS.min_count,
    per_group: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sequences used of each group; all by default. Not with --split random.",
        ),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Labelled sequences used, drawn at random.")
    ] = 20_000,
    max_length: Annotated[
        int | None,
        typer.Option(min=3, help="Tokens read of each, by all features; whole by default."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in a batch, padding included.")
    ] = 8192,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 0,
) -> None:
    """Predict labels of proteins from embeddings, and from what embeddings must beat."""
    with one_line_errors("probe", "--batch-tokens, --max-length or --max-sequences"):
        require_scikit_learn()
        options = ProbeOptions(split=split, repeats=repeats, min_count=min_count, seed=seed)
        chosen = [name.strip() for name in features.split(",")]
        unknown = [name for name in chosen if name not in FEATURES]
        if unknown:
            raise UserError(f"--features must be some of {','.join(FEATURES)}; got {unknown[0]!r}")
        check_pooling(pooling)
        model, fasta = model_and_fasta(paths)
        network, tokenizer = load_model(model)
        records = protein_records(fasta)
        task = build_task(
            records,
            labels=read_labels(labels) if labels else None,
            groups=read_groups(groups) if groups else None,
            grouped=split == "groups",
            max_per_group=per_group,
            max_sequences=max_sequences,
            max_residues=max_length - tokenizer.num_special_tokens_to_add() if max_length else None,
            seed=seed,
        )
        for line in task.notes:
            note(line)
        prepare_output_folder(output_folder)
        with ProgressBars() as bars:
            found = run_probe(
                probe_features(
                    network,
                    tokenizer,
                    task.sequences,
                    features=chosen,
                    pooling=pooling,
                    batch_tokens=batch_tokens,
                    seed=seed,
                    progress=lambda name, done, total: bars.update(name, done, total, {}),
                ),
                task,
                options,
                notes=feature_notes(chosen, seed),
                progress=bars.task("fitting"),
            )
        found = {
            "model": str(model),
            "fasta": [str(path) for path in fasta],
            "pooling": pooling,
            **found,
        }
        write_json(output_folder / "probe.json", found)
        save_figure(probe_figure(found), output_folder / "probe.png")
        # Those of the task were said before the long part.
        _print(found, found["notes"][len(task.notes) :])
        output.print(f"results: {output_folder / 'probe.json'}", soft_wrap=True)


def _print(found: Mapping[str, Any], notes: Sequence[str]) -> None:
    kind = "one of" if found["multiclass"] else "any of"
    sizes = found["splits"][0]
    parts = ", ".join(
        f"{sizes[part]['proteins']:,} {part}" for part in ("train", "validation", "test")
    )
    output.print(
        f"{found['proteins']:,} proteins in {found['groups']:,} groups, each with {kind} "
        f"{len(found['labels'])} labels; {len(found['splits'])} splits, the first {parts}.",
        soft_wrap=True,
    )
    if found["dropped"]:
        few = found["settings"]["min_count"]
        output.print(f"{len(found['dropped'])} labels with fewer than {few} proteins dropped.")
    if found["settings"]["split"] == "random":
        output.print("Split at random: relatives of the test sequences were trained on.")
    metrics = [
        name for name in METRICS if name in next(iter(found["features"].values()))["metrics"]
    ]
    first = next(iter(found["features"]))
    table = _table(metrics, found["features"])
    for name, row in found["features"].items():
        table.add_row(name, *(_with_sd(row["metrics"][metric]) for metric in metrics))
    output.print(table)
    if found["differences"]:
        output.print(f"{first} minus the others, paired by split (splits in which {first} won):")
        table = _table(metrics, found["differences"])
        for name, row in found["differences"].items():
            cells = (f"{_with_sd(row[m], '+.3f')} ({row[m]['wins']})" for m in metrics)
            table.add_row(name, *cells)
        output.print(table)
    for line in notes:
        output.print(f"Note: {line}.", soft_wrap=True, markup=False)


def _table(metrics: list[str], names: Iterable[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # On a narrow terminal it is the numbers that wrap.
    table.add_column(min_width=max(map(len, names)))
    for metric in metrics:
        table.add_column(METRICS[metric], justify="right")
    return table


def _with_sd(value: Mapping[str, Any], style: str = ".3f") -> str:
    mean = format(value["mean"], style)
    return mean if value["sd"] is None else f"{mean} ± {value['sd']:.3f}"
