"""``python -m studies.long_documents``: passages find the long documents they were cut from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from performers.app.errors import UserError
from performers.app.options import argument, option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import StudyOptions, run_parts

app = App()


@dataclass(frozen=True, kw_only=True)
class LongDocumentsOptions(StudyOptions):
    """Options of the study."""

    model: str = argument("Folder of the original, an encoder.", path=True, changes_result=False)
    converted: str = argument("Folder of the converted model.", path=True, changes_result=False)
    texts: str = argument("Folder of text files, one a book.", path=True, changes_result=False)
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

    from studies.long_documents.retrieval import Retrieval, tables

    files = sorted(Path(options.texts).glob("*.txt"))
    if not files:
        raise UserError(f"TEXTS {options.texts} has no file that ends in .txt")
    torch.set_num_threads(options.threads)
    settings = {**options.settings(), "files": [file.name for file in files]}
    shown = partial(tables, passages=options.passages)
    run_parts(options, Retrieval(options, files).parts(), shown, settings=settings)


if __name__ == "__main__":
    end_at_once()
    app()
