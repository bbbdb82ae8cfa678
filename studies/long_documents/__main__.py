"""``python -m studies.long_documents``: passages find the long documents they were cut from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from performers.app.errors import UserError
from performers.app.options import Options, argument, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once

app = App()


@dataclass(frozen=True, kw_only=True)
class LongDocumentsOptions(Options):
    """Options of the study."""

    model: str = argument("Folder of the original, an encoder.", path=True)
    converted: str = argument("Folder of the converted model.", path=True)
    texts: str = argument("Folder of text files, one a book.", path=True)
    output_folder: Path = option("Folder of results.json.", flag="--output")
    resume: bool = option("Skip what results.json and the kept embeddings have.", False)
    lengths: tuple[int, ...] = option(
        "Tokens of a document, rising multiples of 512.", (2048, 4096, 8192, 16384), rising=True
    )
    exact_up_to: int = option("Longest document that the original reads whole.", 8192)
    per_file: int = option("Documents of a file.", 4, at_least=1)
    passages: int = option("Passages to find each document by.", 6, at_least=1)
    passage_tokens: int = option("Tokens of a passage.", 128, at_least=1)
    seed: int = option("Random seed.", 0)
    threads: int = option("Threads of torch.", 1, at_least=1)

    def __post_init__(self) -> None:
        """Check the lengths."""
        super().__post_init__()
        if any(length % 512 for length in self.lengths):
            raise UserError(f"--lengths must be multiples of 512, got {list(self.lengths)}")


@app.command()
def long_documents(options: LongDocumentsOptions) -> None:
    """Compare truncation, chunks, the original with more positions, and the converted model."""
    import torch

    from studies.long_documents.retrieval import Retrieval, Size, tables
    from studies.parts import run_parts

    files = tuple(sorted(Path(options.texts).glob("*.txt")))
    if not files:
        raise UserError(f"TEXTS {options.texts} has no file that ends in .txt")
    torch.set_num_threads(options.threads)
    given = asdict(options)
    size = Size(**{name: given[name] for name in Size.__dataclass_fields__})
    settings = {
        **asdict(size),
        "files": [file.name for file in files],
        "threads": options.threads,
    }
    folder = options.output_folder / "embeddings"
    retrieval = Retrieval(options.model, options.converted, files, size, folder)
    run_parts(
        options.output_folder,
        settings,
        retrieval.parts(),
        partial(tables, size),
        resume=options.resume,
    )


if __name__ == "__main__":
    end_at_once()
    app()
