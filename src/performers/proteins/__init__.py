"""Protein language models: load one, embed and score proteins; training, corpora, reports.

Names are imported on first use, so that the command line starts before torch does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from performers.proteins.inputs.fasta import read_fasta
    from performers.proteins.inputs.records import ProteinRecord
    from performers.proteins.model import ProteinModel, embed, load, score
    from performers.proteins.scoring.likelihood import ProteinScore

_PLACES = {
    "ProteinModel": "model",
    "ProteinRecord": "inputs.records",
    "ProteinScore": "scoring.likelihood",
    "embed": "model",
    "load": "model",
    "read_fasta": "inputs.fasta",
    "score": "model",
}
__all__ = ["ProteinModel", "ProteinRecord", "ProteinScore", "embed", "load", "read_fasta", "score"]


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
