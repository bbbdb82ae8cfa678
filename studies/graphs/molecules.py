"""Molecules of MOSES as graphs, with the penalised logP of the ZINC benchmark as target."""

from __future__ import annotations

import gzip
import random
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import AddRandomWalkPE

from performers.app.errors import UserError

WALKS = 16
"""Length of the random walks whose returns are a node's structural encoding."""
_MEMBER = "moses/dataset/data/{}.csv.gz"
_LARGEST_FREE_RING = 6


class Molecules(NamedTuple):
    """Graphs with target ``y``, split by scaffold.

    Attributes:
        train: Molecules of MOSES' training set.
        validation: Molecules of MOSES' scaffold test set.
        test: Molecules of the same, none of whose scaffolds is in ``validation``.
        atoms: Number of types of atoms.
        bonds: Number of types of bonds.
    """

    train: list[Data]
    validation: list[Data]
    test: list[Data]
    atoms: int
    bonds: int


def read_molecules(wheel: Path, sizes: Sequence[int]) -> Molecules:
    """Draw molecules from the wheel of ``molsets`` (`chosen_smiles`) and make them graphs.

    Types are ``(element, charge, hydrogens)`` of atoms and orders of bonds.
    """
    from rdkit.Chem import MolFromSmiles

    chosen = chosen_smiles(wheel, sizes)
    molecules = {name: [MolFromSmiles(x) for x in lines] for name, lines in chosen.items()}
    every = [x for group in molecules.values() for x in group]
    atoms = _numbers(_atom(atom) for x in every for atom in x.GetAtoms())
    bonds = _numbers(_bond(bond) for x in every for bond in x.GetBonds())
    graphs = {name: [_graph(x, atoms, bonds) for x in group] for name, group in molecules.items()}
    return Molecules(**graphs, atoms=len(atoms), bonds=len(bonds))


def chosen_smiles(wheel: Path, sizes: Sequence[int]) -> dict[str, list[str]]:
    """SMILES of ``train``, ``validation`` and ``test``.

    Raises:
        UserError: The file cannot be read, or has fewer molecules.
    """
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    source = random.Random(0)
    pools = {name: _smiles(wheel, name) for name in ("train", "test_scaffolds")}
    for pool in pools.values():
        source.shuffle(pool)
    wanted = dict(zip(("train", "validation", "test"), sizes, strict=True))
    chosen: dict[str, list[str]] = {name: [] for name in wanted}
    chosen["train"] = pools["train"][: wanted["train"]]
    place: dict[str, str] = {}
    for smiles in pools["test_scaffolds"]:
        missing = [x for x in ("validation", "test") if len(chosen[x]) < wanted[x]]
        if not missing:
            break
        # A scaffold is drawn for one of the two sets once.
        scaffold = MurckoScaffoldSmiles(smiles)
        name = place.setdefault(scaffold, source.choice(("validation", "test")))
        if name in missing:
            chosen[name].append(smiles)
    for name, size in wanted.items():
        if len(chosen[name]) < size:
            raise UserError(f"{wheel} has {len(chosen[name])} molecules for {name}, not {size}")
    return chosen


def penalised_logp(molecule: Any) -> float:
    """``logP - SA - max(largest ring - 6, 0)``, not normalised.

    logP by Wildman and Crippen, synthetic accessibility by Ertl and Schuffenhauer.

    Raises:
        UserError: This rdkit has no contributions, among which the latter is.
    """
    from rdkit.Chem.rdMolDescriptors import CalcCrippenDescriptors

    try:
        from rdkit.Contrib.SA_Score import sascorer
    except ImportError as error:
        raise UserError(f"{error}; the rdkit of PyPI has it: pip install rdkit") from error
    ring = max((len(ring) for ring in molecule.GetRingInfo().AtomRings()), default=0)
    accessibility = sascorer.calculateScore(molecule)
    return float(
        CalcCrippenDescriptors(molecule)[0] - accessibility - max(ring - _LARGEST_FREE_RING, 0)
    )


def targets(graphs: Sequence[Data]) -> Tensor:
    """The targets of graphs."""
    return torch.cat([graph.y for graph in graphs])


def _smiles(wheel: Path, name: str) -> list[str]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            text = gzip.decompress(archive.read(_MEMBER.format(name))).decode()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} is not the wheel of molsets: {error}") from error
    return text.split()[1:]


def _atom(atom: Any) -> tuple[int, int, int]:
    return atom.GetAtomicNum(), atom.GetFormalCharge(), atom.GetTotalNumHs()


def _bond(bond: Any) -> int:
    return int(bond.GetBondType())


def _numbers(types: Iterable[Any]) -> dict[Any, int]:
    return {name: number for number, name in enumerate(sorted(set(types)))}


def _graph(molecule: Any, atoms: dict[Any, int], bonds: dict[Any, int]) -> Data:
    ends = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    kinds = torch.tensor([bonds[_bond(bond)] for bond in molecule.GetBonds()], dtype=torch.int64)
    edges = torch.tensor(ends, dtype=torch.int64).reshape(-1, 2).T
    graph = Data(
        x=torch.tensor([atoms[_atom(atom)] for atom in molecule.GetAtoms()]),
        edge_index=torch.cat([edges, edges.flip(0)], dim=1),
        edge_attr=torch.cat([kinds, kinds]),
        y=torch.tensor([penalised_logp(molecule)]),
    )
    return AddRandomWalkPE(WALKS, attr_name="walks")(graph)
