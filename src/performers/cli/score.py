"""``performers score``: likelihoods of proteins, residues and substitutions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from performers.app.errors import UserError
from performers.app.files import prepare_output_file, replacement
from performers.app.options import Options, option
from performers.app.provenance import KEY, provenance
from performers.cli.console import ProgressBars, note
from performers.cli.inputs import Computation, ManyProteins, RelativesOptions, checked_proteins
from performers.cli.variants import VariantTable, score_variants
from performers.proteins.options import SCORE_METHODS

_HEADINGS = ("name", "length", "log_likelihood", "mean", "perplexity")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """Options of ``performers score``."""

    output_file: Path | None = option(
        "A .tsv file with a line for each protein, or a .json file, which has the residues' "
        "besides; a table on standard output by default.",
        None,
        flag="--output",
    )
    residues: Path | None = option("A .tsv file with a line for each residue.", None)
    substitutions: Path | None = option(
        "A .tsv file with a line for each residue and the log-odds of the 20 amino acids against "
        "it.",
        None,
    )
    variants: Path | None = option(
        "A table of variants to score in place of proteins: name of the protein, tab, "
        "substitutions such as A123V or A123V:G7D. Printed are their log-odds, and with "
        "--relatives those besides.",
        None,
    )
    method: str | None = option(
        "Of a masked model. masked, the default: each residue is hidden by itself, one run of the "
        "model a residue; one-pass: none is hidden, fast, and flattering since the model sees "
        "what it is asked for. Causal models are exact.",
        None,
        choices=SCORE_METHODS,
    )


def score(
    inputs: ManyProteins,
    options: ScoreOptions,
    family: RelativesOptions,
    computation: Computation,
) -> None:
    """Log-likelihood of each protein and residue, and log-odds of substitutions."""
    named = {
        "--output": options.output_file,
        "--residues": options.residues,
        "--substitutions": options.substitutions,
    }
    files = {flag: file for flag, file in named.items() if file is not None}
    others = [flag for flag in files if flag != "--output"]
    if others and options.variants is not None:
        raise UserError(f"{others[0]} cannot be combined with --variants; leave out one")
    if len({file.absolute() for file in files.values()}) < len(files):
        raise UserError("--output, --residues and --substitutions must be different files")
    for flag, file in files.items():
        both = flag == "--output" and options.variants is None
        prepare_output_file(file, (".tsv", ".json") if both else (".tsv",), flag=flag)
    folder, fasta = inputs.split(relatives=family.relatives is not None)
    with ExitStack() as stack:
        checked = checked_proteins(fasta, skip_invalid=inputs.skip_invalid)
        proteins = stack.enter_context(checked)
        from performers.proteins.inputs.tokenizer import AMINO_ACIDS
        from performers.proteins.model import load

        model = load(folder, device=computation.device, dtype=computation.dtype)
        table = None
        if options.variants is not None:
            table = VariantTable(options.variants, proteins)
        else:
            model.check_length(proteins.letters.longest)
        read = proteins.records() if table is None else set(table.proteins.values())
        relatives = family.read(folder, model.tokenizer, read)
        bars = stack.enter_context(ProgressBars())
        if table is not None:
            columns = ["name", "variant", "log_odds"]
            columns += [] if relatives is None else ["log_odds_with_relatives"]
            row = stack.enter_context(_table(options.output_file, columns, sys.stdout))
            score_variants(
                table,
                model,
                relatives,
                row,
                bars,
                method=options.method,
                batch_tokens=computation.batch_tokens,
            )
            note(proteins.letters.skips())
            return
        write = stack.enter_context(_proteins(options.output_file, folder))
        place = ("name", "position", "residue")
        residues = stack.enter_context(_table(options.residues, (*place, "log_likelihood")))
        substitutions = stack.enter_context(_table(options.substitutions, (*place, *AMINO_ACIDS)))
        done = 0
        for records in proteins.chunks(8 * computation.batch_tokens):
            scores = model.score(
                records,
                method=options.method,
                substitutions=options.substitutions is not None,
                relatives=relatives,
                batch_tokens=computation.batch_tokens,
                progress=bars.part("scoring", done, proteins.letters.residues),
            )
            for record, found in zip(records, scores, strict=True):
                write(record, found)
                for index, residue in enumerate(record.sequence):
                    where = (record.accession, index + 1, residue)
                    residues(*where, found.log_likelihoods[index])
                    if found.log_odds is not None:
                        substitutions(*where, *found.log_odds[index])
                done += len(record.sequence)
        note(proteins.letters.skips())


@contextmanager
def _proteins(path: Path | None, model: Path) -> Iterator[Callable[..., None]]:
    """Writer of a protein and its score, to a table or to JSON."""
    if path is None or path.suffix.lower() == ".tsv":
        with _table(path, _HEADINGS, sys.stdout) as row:
            yield lambda record, found: row(*_values(record, found))
        return
    with replacement(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        made = json.dumps({KEY: provenance("score", model=model)}, indent=2)
        # One object, written a protein at a time.
        separator = made.removesuffix("\n}") + ',\n  "proteins": ['

        def write(record: Any, found: Any) -> None:
            nonlocal separator
            content = {
                **dict(zip(_HEADINGS, _values(record, found), strict=True)),
                "header": record.header,
                "log_likelihoods": [round(x, 6) for x in found.log_likelihoods.tolist()],
            }
            file.write(f"{separator}\n{json.dumps(content)}")
            separator = ","

        yield write
        file.write("\n  ]\n}\n")


def _values(record: Any, found: Any) -> tuple[Any, ...]:
    """Those of ``_HEADINGS``."""
    size = len(record.sequence)
    return record.accession, size, found.log_likelihood, found.mean, found.perplexity


@contextmanager
def _table(
    path: Path | None, headings: Sequence[str], otherwise: IO[str] | None = None
) -> Iterator[Callable[..., None]]:
    """Writer of rows of a tab-separated table; of none without a file."""
    with ExitStack() as stack:
        file = otherwise
        if path is not None:
            temporary = stack.enter_context(replacement(path))
            file = stack.enter_context(temporary.open("w", encoding="utf-8"))
        first = True

        def row(*values: Any) -> None:
            nonlocal first
            if file is not None:
                # An error before the first row leaves standard output empty.
                if first:
                    print(*headings, sep="\t", file=file)
                first = False
                print(*map(_cell, values), sep="\t", file=file)

        yield row


def _cell(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    # A residue that is none of the 20 amino acids has no log-odds.
    return "" if value != value else f"{value:.6g}"
