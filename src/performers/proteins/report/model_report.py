"""Reports on trained models: what ``performers report`` and the demo write."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.figures import shortened
from performers.app.files import read_json
from performers.app.progress import Report, part
from performers.features import FeatureMap
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import Relatives, RelativesRows
from performers.proteins.model import ProteinModel
from performers.proteins.model_folder import model_max_length
from performers.proteins.reading.analysis import analyse_model
from performers.proteins.reading.relative_shares import relative_shares
from performers.proteins.reading.residues import read_proteins
from performers.proteins.reading.site_scores import header_sites, parse_sites
from performers.proteins.report.page import ModelReport, write_report
from performers.proteins.report.payload import grouped
from performers.proteins.scoring.evaluation import evaluate_model


def report_on_model(
    models: Sequence[ProteinModel],
    records: Sequence[ProteinRecord],
    output: Path,
    *,
    protein: str | None = None,
    sites: str | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    relatives: Relatives | None = None,
    max_sequences: int = 200,
    max_length: int = 256,
    max_residues: int = 50_000,
    report: Report | None = None,
) -> Path:
    """Write ``report.html`` and ``report.json`` on a model and the sequences given.

    The first of the models is that of the map and the residues, and alone reads the protein with
    ``relatives``. The options are those of ``performers report``, see its ``--help``. ``report`` is
    called with the name of a step, the units done, the units in all, and a log entry.

    Raises:
        UserError: No sequence has that name, no label is of a sequence, a site is none of its
            residues, or it has no relative.
    """
    if labels is not None and all(record.look_up(labels) is None for record in records):
        raise UserError(
            f"--labels names none of the proteins: names in the FASTA files are such as "
            f"{records[0].name!r}, in the labels such as {next(iter(labels), '')!r}; write the "
            "same names, or the accessions of headers such as sp|P12345|NAME"
        )
    drawn = choose_protein(records, protein, max_length)
    shown = _sample(records, max_sequences, drawn)
    marked = header_sites(drawn) if sites is None else parse_sites(sites, len(drawn.sequence))
    described = []
    for number, model in enumerate(models):
        name = model.folder.resolve().name
        metrics = evaluate_model(
            model.network,
            model.tokenizer,
            [record.sequence for record in records],
            max_length=model_max_length(model.tokenizer),
            progress=part(report, f"evaluating {name}" if number else "evaluating"),
        )
        described.append(
            describe_model(
                model,
                records,
                drawn,
                name=name,
                metrics={"given sequences": metrics},
                max_sequences=max_sequences,
                max_length=max_length,
                sites=marked,
                shown=() if number else shown,
                relatives=None if number or relatives is None else relatives.rows([drawn]),
                report=report,
            )
        )
    columns = None
    if labels is not None:
        joined = [", ".join(record.look_up(labels) or ()) for record in shown]
        columns = {"label": grouped([shortened(text, 40) for text in joined])}
    return write_report(output, models=described, labels=columns, max_residues=max_residues)


def describe_model(
    model: ProteinModel,
    records: Sequence[ProteinRecord],
    protein: ProteinRecord,
    *,
    name: str,
    metrics: Mapping[str, Mapping[str, float]],
    max_sequences: int,
    max_length: int,
    sites: Sequence[int] = (),
    shown: Sequence[ProteinRecord] = (),
    relatives: RelativesRows | None = None,
    report: Report | None = None,
) -> ModelReport:
    """One model's part of a report: settings, metrics, learning curve, guesses and attention.

    Arguments are as of ``report_on_model``: ``records`` are behind the amino-acid similarity, the
    residues of ``shown`` are guessed one by one, ``relatives`` have the one row of ``protein``.
    """
    loaded = model.network, model.tokenizer
    return ModelReport(
        name=name,
        settings=_settings(model),
        metrics=metrics,
        history=_recorded(model, "trainer_state.json").get("log_history", []),
        analysis=analyse_model(
            *loaded,
            [record.sequence for record in records],
            protein=protein,
            max_sequences=max_sequences,
            max_length=max_length,
            sites=sites,
            progress=part(report, f"reading attention, {name}"),
        ),
        is_causal=bool(model.network.config.is_decoder),
        proteins=read_proteins(
            *loaded,
            shown,
            max_length=model_max_length(model.tokenizer),
            progress=part(report, f"guessing each residue, {name}"),
        ),
        available=len(records),
        relatives=None if relatives is None else relative_shares(*loaded, protein, relatives),
    )


def choose_protein(
    records: Sequence[ProteinRecord], name: str | None, max_length: int
) -> ProteinRecord:
    """The protein of a name or accession, or the first of a length that makes a readable map.

    Raises:
        UserError: No sequence has that name.
    """
    if name is not None:
        named = {record.accession: record for record in reversed(records)}
        named |= {record.name: record for record in reversed(records)}
        if name in named:
            return named[name]
        known = ", ".join(record.name for record in records[:5])
        raise UserError(f"--protein {name!r} is not in the FASTA files; the first are {known}")
    for low in (80, 1):
        for record in records:
            if low <= len(record.sequence) <= max_length - 2:
                return record
    return records[0]


def _sample(
    records: Sequence[ProteinRecord], count: int, protein: ProteinRecord
) -> list[ProteinRecord]:
    """At most so many of the records, in their order, `protein` among them."""
    if len(records) <= count:
        return list(records)
    kept = set(random.Random(0).sample(range(len(records)), count))
    place = next(i for i, record in enumerate(records) if record is protein)
    if place not in kept:
        kept = {*sorted(kept)[1:], place}
    return [records[i] for i in sorted(kept)]


def _settings(model: ProteinModel) -> dict[str, Any]:
    config = model.network.config
    settings: dict[str, Any] = {
        "attention": config.attention,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "width": config.hidden_size,
        "parameters": f"{sum(p.numel() for p in model.network.parameters()):,}",
    }
    # Exact attention has none, nor have layers in exact_layers; the others are alike.
    maps = [module for module in model.network.modules() if isinstance(module, FeatureMap)]
    if maps:
        settings["random features per head"] = maps[0].num_features
    training = _recorded(model, "training.json")
    if training:
        for name, part, key in (
            ("objective", "options", "objective"),
            ("steps", "options", "steps"),
            ("tokens in a batch", "options", "batch_tokens"),
            ("seconds of training", "result", "seconds"),
            ("training sequences", "data", "sequences"),
        ):
            settings[name] = training.get(part, {}).get(key)
    return settings


def _recorded(model: ProteinModel, name: str) -> dict[str, Any]:
    """A file of the model's training; empty where it has none."""
    path = model.folder / name
    return dict(read_json(path)) if path.exists() else {}
