"""The dependency graph of Debian's packages: ``python -m studies.graphs.debian FILE``.

Nodes are packages, edges their Depends, Pre-Depends and Recommends (all alternatives), labels their
sections. Made from the package index of any Debian.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from performers.app.errors import UserError
from performers.app.files import write_atomically
from performers.app.options import Options, argument, option
from performers.cli.commands import App
from performers.cli.console import note
from performers.cli.interrupts import end_at_once
from studies.debian import named_packages, package_fields, read_index

GRAMS = 256
"""Number of hash values of 3-grams."""
_TRAIN, _VALIDATION = 60, 80

app = App()


class Packages(NamedTuple):
    """The graph of packages.

    Attributes:
        names: Names, sorted.
        sources: Name of the source package of each.
        sections: Section of each.
        edges: ``(2, E)``: a package and one that it names.
    """

    names: list[str]
    sources: list[str]
    sections: list[str]
    edges: Tensor


class NodeTask(NamedTuple):
    """Classification of packages by section.

    Attributes:
        features: Shares of the hash values among the 3-grams of a name, and logarithms of 1 plus
            the out-degree and the in-degree, ``(N, GRAMS + 2)``.
        edge_index: Edges in both directions, each once, no loops.
        labels: Number of the section.
        classes: Number of sections.
        split: 0 training, 1 validation, 2 test; the packages of a source are in one.
    """

    features: Tensor
    edge_index: Tensor
    labels: Tensor
    classes: int
    split: Tensor


def parse_packages(index: str) -> Packages:
    """Read a package index; names that no package has are left out."""
    packages = {
        name: fields for name, fields in package_fields(index).items() if "Section" in fields
    }
    numbers = {name: number for number, name in enumerate(sorted(packages))}
    edges = {
        (numbers[package], numbers[name])
        for package, fields in packages.items()
        for name in named_packages(fields)
        if name in numbers and name != package
    }
    return Packages(
        list(numbers),
        [packages[name].get("Source", name).split(" ")[0] for name in numbers],
        # The areas contrib and non-free have the sections of main.
        [packages[name]["Section"].rsplit("/", 1)[-1] for name in numbers],
        torch.tensor(sorted(edges), dtype=torch.int64).reshape(-1, 2).T.contiguous(),
    )


def save_packages(packages: Packages, file: Path) -> None:
    """Write a graph as ``.npz``."""
    edges, content = packages.edges.numpy().astype(np.int32), io.BytesIO()
    np.savez_compressed(content, **{**packages._asdict(), "edges": edges})
    write_atomically(file, content.getvalue())


def load_packages(file: Path) -> Packages:
    """Read a graph that `save_packages` wrote.

    Raises:
        UserError: The file is not such a graph.
    """
    try:
        with np.load(file) as arrays:
            names, sources, sections = (arrays[name].tolist() for name in Packages._fields[:3])
            return Packages(names, sources, sections, torch.from_numpy(arrays["edges"]).long())
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} is not a graph of packages: {error}") from error


def node_task(packages: Packages) -> NodeTask:
    """Features, labels and split of a graph of packages."""
    sections = {name: number for number, name in enumerate(sorted(set(packages.sections)))}
    count = len(packages.names)
    places = [
        number * GRAMS + zlib.crc32(gram.encode()) % GRAMS
        for number, name in enumerate(packages.names)
        for gram in _grams(f"^{name}$")
    ]
    grams = torch.tensor(places).bincount(minlength=count * GRAMS).reshape(count, GRAMS).float()
    degrees = torch.stack([row.bincount(minlength=count) for row in packages.edges], dim=1)
    return NodeTask(
        torch.cat([grams / grams.sum(1, keepdim=True), degrees.float().log1p()], dim=1),
        torch.cat([packages.edges, packages.edges.flip(0)], dim=1).unique(dim=1),
        torch.tensor([sections[name] for name in packages.sections]),
        len(sections),
        torch.tensor([_part(source) for source in packages.sources]),
    )


def _grams(name: str) -> list[str]:
    return [name[i : i + 3] for i in range(len(name) - 2)]


def _part(source: str) -> int:
    place = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") % 100
    return int(place >= _TRAIN) + int(place >= _VALIDATION)


@dataclass(frozen=True, kw_only=True)
class DebianOptions(Options):
    """Options of the command."""

    file: str = argument("File to write, debian.npz.", path=True)
    packages: str | None = option(
        "A Debian package index; by default that of apt-cache dumpavail.", None, path=True
    )


@app.command()
def debian(options: DebianOptions) -> None:
    """Write the dependency graph of Debian's packages."""
    packages = parse_packages(read_index(options.packages))
    save_packages(packages, Path(options.file))
    note(
        f"{options.file}: {len(packages.names):,} packages, {packages.edges.shape[1]:,} edges, "
        f"{len(set(packages.sections))} sections, {len(set(packages.sources)):,} sources"
    )


if __name__ == "__main__":
    end_at_once()
    app()
