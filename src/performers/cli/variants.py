"""``performers score --variants``: log-odds of the variants of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from performers.app.errors import UserError
from performers.app.files import read_lines
from performers.cli.console import ProgressBars, note
from performers.cli.inputs import ProteinFiles

if TYPE_CHECKING:
    from performers.proteins.inputs.records import ProteinRecord
    from performers.proteins.inputs.relatives import Relatives
    from performers.proteins.model import ProteinModel
    from performers.proteins.scoring.variants import Substitution

_AT_ONCE = 1000


class Line(NamedTuple):
    """A line of the table."""

    number: int
    name: str
    text: str


class VariantTable:
    """A table of variants, read a line at a time, and the ``proteins`` that it names.

    Memory grows with the number of these, not with that of the variants. The table is text in
    UTF-8, a variant a line: name or accession of a protein, tab, variant. A first line whose second
    column is ``variant`` or ``substitution`` is a heading.

    Raises:
        UserError: The file is missing, empty or not of this format, names no protein of the files
            or one that is twice in them, or a variant is not one of its protein.
    """

    def __init__(self, path: Path, files: ProteinFiles) -> None:
        from performers.proteins.scoring.variants import check_variant, parse_variant

        self._path = path
        self.count = 0
        first: dict[str, int] = {}
        for line in self.lines():
            self.count += 1
            first.setdefault(line.name, line.number)
        if not self.count:
            raise UserError(f"{path} holds no variant; expected lines of name, tab, A123V")
        self.proteins: dict[str, ProteinRecord] = {}
        for record in files.records():
            for name in {record.name, record.accession} & first.keys():
                if name in self.proteins:
                    raise UserError(
                        f"{path}:{first[name]}: {name!a} is the name of several proteins in the "
                        "FASTA files; give each a name of its own"
                    )
                self.proteins[name] = record
        for name, number in first.items():
            if name not in self.proteins:
                raise UserError(f"{path}:{number}: {name!a} is no protein of the FASTA files")
        for line in self.lines():
            try:
                check_variant(parse_variant(line.text), self.proteins[line.name].sequence)
            except UserError as error:
                raise UserError(f"{path}:{line.number}: {error}, in {line.name!a}") from error

    def lines(self) -> Iterator[Line]:
        """The lines in order."""
        first = True
        for number, text in read_lines(self._path):
            fields = [field.strip() for field in text.split("\t")]
            heading = first and fields[1:2] and fields[1].lower() in ("variant", "substitution")
            first = False
            if heading:
                continue
            if len(fields) != 2 or not all(fields):
                raise UserError(
                    f"{self._path}:{number}: expected the name of a protein and a variant such as "
                    f"A123V with a tab between; got {text[:60]!r}"
                )
            yield Line(number, *fields)


def score_variants(
    table: VariantTable,
    model: ProteinModel,
    relatives: Relatives | None,
    row: Callable[..., None],
    bars: ProgressBars,
    *,
    method: str | None,
    batch_tokens: int,
) -> None:
    """Score the variants of a table, in its order, and write a row for each.

    Positions of a protein are read once where its variants are neighbouring lines.
    """
    from performers.proteins.scoring.variants import parse_variant

    progress, done = bars.task("scoring"), 0
    for name, group in groupby(table.lines(), key=itemgetter(1)):
        protein = table.proteins[name]
        scorers = [
            model.variant_scorer(protein, relatives=read, method=method, batch_tokens=batch_tokens)
            for read in ([None] if relatives is None else [None, relatives])
        ]
        while lines := list(islice(group, _AT_ONCE)):
            variants: list[tuple[Substitution, ...]] = [parse_variant(x.text) for x in lines]
            found = [scorer(variants) for scorer in scorers]
            for line, *values in zip(lines, *found, strict=True):
                row(line.name, line.text, *values)
            done += len(lines)
            progress(done, table.count)
    note(f"{table.count:,} variants of {len(table.proteins):,} proteins")
