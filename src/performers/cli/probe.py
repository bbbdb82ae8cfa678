"""``performers probe``: what a model's embeddings tell of labelled proteins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers.app.files import prepare_output_folder
from performers.app.options import option
from performers.app.provenance import write_result
from performers.cli.console import ProgressBars, note, output, table
from performers.cli.inputs import BATCH_TOKENS, NEW_FOLDER, ModelAndFasta, protein_records
from performers.proteins.options import POOLINGS
from performers.proteins.probe.options import PROBE_FEATURES, ProbeOptions

# <bos> and <eos> around every protein.
_FRAME = 2
# Metrics side by side in 80 columns.
_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class ProbeInputs(ModelAndFasta):
    """Proteins, labels and features of a probe."""

    output_folder: Path = option(**NEW_FOLDER)
    labels: Path | None = option(
        "Table: name, tab, labels with commas between, and perhaps a tab and the group. By "
        "default labels=A,B in the FASTA headers.",
        None,
    )
    groups: Path | None = option(
        "Clusters of related sequences, the *_cluster.tsv of mmseqs2. By default the groups in "
        "--labels, or family=NAME in the FASTA headers. Not with --split random.",
        None,
    )
    features: tuple[str, ...] = option(
        "Features to compare, with commas between.", PROBE_FEATURES, choices=PROBE_FEATURES
    )
    pooling: str = option(
        "Of embeddings: mean, or mean-sd; see performers embed.", POOLINGS[0], choices=POOLINGS
    )
    per_group: int | None = option(
        "Sequences used of each group; all by default. Not with --split random.", None, at_least=1
    )
    max_sequences: int = option("Labelled sequences used, drawn at random.", 20_000, at_least=1)
    max_length: int | None = option(
        "Tokens read of each, by all features; whole by default.", None, at_least=3
    )
    batch_tokens: int = option(**BATCH_TOKENS)


def probe(inputs: ProbeInputs, options: ProbeOptions) -> None:
    """Predict labels of proteins from embeddings, and from what embeddings must beat."""
    import sklearn  # noqa: F401, missing without the extra

    from performers.proteins.probe.labels import read_groups, read_labels
    from performers.proteins.probe.splits import plan_splits
    from performers.proteins.probe.task import build_task

    model, fasta = inputs.split()
    task = build_task(
        protein_records(fasta),
        labels=read_labels(inputs.labels) if inputs.labels else None,
        groups=read_groups(inputs.groups) if inputs.groups else None,
        grouped=options.split == "groups",
        max_per_group=inputs.per_group,
        max_sequences=inputs.max_sequences,
        max_residues=inputs.max_length - _FRAME if inputs.max_length else None,
        seed=options.seed,
    )
    for line in task.notes:
        note(line)
    # All that can be refused is refused before the model is loaded.
    plan_splits(task, options)
    folder = prepare_output_folder(inputs.output_folder)

    from performers.app.figures import save_figure
    from performers.proteins.model_folder import load_model
    from performers.proteins.probe.features import feature_notes, probe_features
    from performers.proteins.probe.figure import probe_figure
    from performers.proteins.probe.run import run_probe

    network, tokenizer = load_model(model)
    with ProgressBars() as bars:
        found = run_probe(
            probe_features(
                network,
                tokenizer,
                task.sequences,
                features=inputs.features,
                pooling=inputs.pooling,
                batch_tokens=inputs.batch_tokens,
                seed=options.seed,
                report=bars.update,
            ),
            task,
            options,
            notes=feature_notes(inputs.features, options.seed),
            progress=bars.task("fitting"),
        )
    found = {
        "model": str(model),
        "fasta": [str(path) for path in fasta],
        "pooling": inputs.pooling,
        **found,
    }
    write_result(folder / "probe.json", found, "probe", seed=options.seed, model=model)
    save_figure(probe_figure(found), folder / "probe.png")
    # Those of the task were said before the long part.
    _print(found, found["notes"][len(task.notes) :])
    output.print(f"results: {folder / 'probe.json'}", soft_wrap=True)


def _print(found: Mapping[str, Any], notes: Sequence[str]) -> None:
    from performers.proteins.probe.figure import METRICS

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
    tables = -(-len(metrics) // _COLUMNS)
    size = -(-len(metrics) // tables)

    def show(features: Mapping[str, Any], cell: Callable[[Any], str]) -> None:
        for start in range(0, len(metrics), size):
            part = metrics[start : start + size]
            rows = [(name, *(cell(row[x]) for x in part)) for name, row in features.items()]
            output.print(table(("", *(METRICS[metric] for metric in part)), rows))

    show({name: row["metrics"] for name, row in found["features"].items()}, _with_sd)
    if found["differences"]:
        first = next(iter(found["features"]))
        output.print(f"{first} minus the others, paired by split (and how many of them it won):")
        show(found["differences"], lambda x: f"{_with_sd(x, '+.3f')} ({x['wins']})")
    for line in notes:
        output.print(f"Note: {line}.", soft_wrap=True, markup=False)


def _with_sd(value: Mapping[str, Any], style: str = ".3f") -> str:
    mean = format(value["mean"], style)
    return mean if value["sd"] is None else f"{mean} ± {value['sd']:.3f}"
