"""``performers embed``: vectors of proteins, or of their residues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from performers.app.files import prepare_output_file
from performers.app.options import Options, option
from performers.cli.console import ProgressBars, note
from performers.cli.inputs import Computation, ManyProteins, RelativesOptions, checked_proteins
from performers.proteins.options import POOLINGS, VECTOR_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(Options):
    """Options of ``performers embed``."""

    output_file: Path = option(
        "A .npz, .parquet, .h5 (a data set a protein) or .tsv file.", flag="--output"
    )
    per_residue: bool = option("A vector for each residue instead of each protein.", False)
    pooling: str = option(
        "mean: of the hidden states over the residues; mean-sd: their standard deviation besides, "
        "twice as wide, which tells a little more of function.",
        POOLINGS[0],
        choices=POOLINGS,
        excludes=("per_residue",),
    )
    layer: int | None = option(
        "Hidden states to take: 0 before the first block, n after block n, negative from the end; "
        "after the last by default.",
        None,
    )


def embed(
    inputs: ManyProteins,
    options: EmbeddingOptions,
    family: RelativesOptions,
    computation: Computation,
) -> None:
    """One vector a sequence: the final hidden states, pooled over its residues."""
    prepare_output_file(options.output_file, VECTOR_SUFFIXES)
    folder, fasta = inputs.split(relatives=family.relatives is not None)
    checked = checked_proteins(fasta, skip_invalid=inputs.skip_invalid)
    with checked as files, ProgressBars() as bars:
        from performers.proteins.model import load
        from performers.proteins.scoring.vector_files import open_vectors

        model = load(folder, device=computation.device, dtype=computation.dtype)
        model.check_length(files.letters.longest)
        relatives = family.read(folder, model.tokenizer, files.records())
        width, done = 0, 0
        with open_vectors(options.output_file, per_residue=options.per_residue) as write:
            for records in files.chunks(8 * computation.batch_tokens):
                vectors = model.embed(
                    records,
                    per_residue=options.per_residue,
                    pooling=options.pooling,
                    layer=options.layer,
                    relatives=relatives,
                    batch_tokens=computation.batch_tokens,
                    progress=bars.part("embedding", done, files.letters.records),
                )
                for record, vector in zip(records, vectors, strict=True):
                    write(record, vector)
                    width = vector.shape[-1]
                done += len(records)
        count = files.letters.residues if options.per_residue else files.letters.records
        note(files.letters.skips())
    note(f"{count:,} vectors of width {width} in {options.output_file}")
