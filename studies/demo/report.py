"""Table of the ``metrics.json`` of ``performers demo``."""

from collections.abc import Mapping
from typing import Any

from studies.pages import Table


def tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """Accuracy and perplexity of each model, after those of the unigram baseline."""

    def line(name: str, model: Mapping[str, Any], prefix: str = "") -> list[str]:
        cells = [name]
        for split in ("test", "ood"):
            cells.append(f"{model[split][f'{prefix}accuracy']:.2%}")
            cells.append(f"{model[split][f'{prefix}perplexity']:.2f}")
        return cells

    first = next(iter(content.values()))
    rows = [line("unigram baseline, on the same residues", first, "baseline_")]
    rows += [line(name, model) for name, model in content.items()]
    columns = ("test accuracy", "test perplexity", "OOD accuracy", "OOD perplexity")
    return {"scores": Table(("model", *columns), rows)}
