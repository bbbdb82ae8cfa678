"""Models, data and verdicts of the study of graphs, against oracles."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data

from studies.graphs.debian import load_packages, node_task, parse_packages, save_packages
from studies.graphs.models import (
    ATTENTIONS,
    EDGES,
    NODE_MODELS,
    OURS,
    PYG,
    PYG_BIASED,
    MoleculeModel,
    NodeModel,
    corrected,
    gps_layer,
    neighbours_of,
    parameters,
    set_neighbours,
)
from studies.graphs.report import comparisons, scaling_verdicts, tables, verdict
from tests.studies.graphs.conftest import index_of_packages

INDEX = """Package: b
Source: s (1.0)
Section: contrib/libs
Depends: a (>= 2), absent | c:any
Description: x
 Depends: d

Package: a
Section: libs
Recommends: b, a

Package: c
Source: s
Section: devel
Pre-Depends: b [amd64], b

Package: nameless
"""


def graphs(sizes=(5, 17)):
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        edges = torch.randint(size, (2, size), generator=generator)
        kinds = torch.randint(3, (size,), generator=generator)
        found.append(
            Data(
                x=torch.randint(4, (size,), generator=generator),
                edge_index=torch.cat([edges, edges.flip(0)], dim=1),
                edge_attr=torch.cat([kinds, kinds]),
                walks=torch.rand(size, 16, generator=generator),
                y=torch.zeros(1),
            )
        )
    return found


def predictions(model, some):
    with torch.no_grad():
        return model.eval()(Batch.from_data_list(some))


def alone(model):
    return torch.cat([predictions(model, [graph]) for graph in graphs()])


def test_neighbours_are_rows_of_the_adjacency():
    edges = torch.tensor([[0, 0, 3, 1], [1, 1, 2, 3]])
    indptr, indices = neighbours_of(edges, 5)
    rows = [indices[a:b].tolist() for a, b in pairwise(indptr)]
    assert rows == [[0], [0, 1], [2, 3], [1, 3], [4]]


def test_exact_on_the_edges_of_a_complete_graph_is_exact_attention():
    torch.manual_seed(0)
    layer = gps_layer(EDGES, None)
    x, mask = torch.randn(2, 9, 64), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    graph = torch.tensor([0] * 6 + [1] * 9)
    pairs = (graph[:, None] == graph).nonzero().T
    set_neighbours(layer, neighbours_of(pairs, len(graph)))
    found = layer.attn(x, mask=mask)
    heads = [f(x).unflatten(-1, (4, 16)).transpose(1, 2) for f in (layer.attn.q, layer.attn.k)]
    value = layer.attn.v(x).unflatten(-1, (4, 16)).transpose(1, 2)
    wanted = F.scaled_dot_product_attention(*heads, value, attn_mask=mask[:, None, None])
    wanted = layer.attn.attn_out(wanted.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_batches_change_predictions_of_the_performer_of_pyg_alone(attention):
    torch.manual_seed(0)
    model = MoleculeModel(attention, 2, 4, 3)
    change = (alone(model) - predictions(model, graphs())).abs().max()
    assert change > 1e-3 if attention in (PYG, PYG_BIASED) else change < 1e-4


@pytest.mark.parametrize("attention", [PYG, PYG_BIASED])
def test_the_corrected_performer_is_that_of_pyg_without_padding(attention):
    torch.manual_seed(0)
    model = MoleculeModel(attention, 2, 4, 3)
    torch.testing.assert_close(alone(corrected(model)), alone(model))
    torch.testing.assert_close(predictions(corrected(model), graphs()), alone(model))


def test_models_are_of_one_size():
    sizes = {name: parameters(MoleculeModel(name, 2, 4, 3)) for name in ATTENTIONS}
    assert max(sizes.values()) < 1.01 * min(sizes.values()), sizes
    assert sizes[OURS] == sizes[PYG_BIASED] == sizes["exact"] == sizes[EDGES]


def test_packages(tmp_path):
    packages = parse_packages(INDEX)
    assert packages.names == ["a", "b", "c"]
    assert packages.sources == ["a", "s", "s"]
    assert packages.sections == ["libs", "libs", "devel"]
    assert packages.edges.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    save_packages(packages, tmp_path / "debian.npz")
    loaded = load_packages(tmp_path / "debian.npz")
    assert loaded[:3] == packages[:3]
    assert bool((loaded.edges == packages.edges).all())
    task = node_task(packages)
    assert task.edge_index.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert task.labels.tolist() == [1, 1, 0]
    assert task.split[1] == task.split[2]
    torch.testing.assert_close(task.features[1, -2:].exp() - 1, torch.tensor([2.0, 2.0]))
    # ^a$ has one 3-gram.
    torch.testing.assert_close(task.features[:, :-2].amax(1), torch.ones(3))


@pytest.mark.parametrize("name", NODE_MODELS)
def test_models_of_packages_do_not_depend_on_their_order(name):
    torch.manual_seed(0)
    packages = parse_packages(index_of_packages(30))
    order = torch.randperm(30)
    place = order.argsort()
    moved = packages._replace(
        **{n: [getattr(packages, n)[i] for i in order] for n in ("names", "sources", "sections")},
        edges=place[packages.edges],
    )
    model = NodeModel(*NODE_MODELS[name], layers=2, classes=2).eval()
    found = []
    for task in (node_task(packages), node_task(moved)):
        set_neighbours(model, neighbours_of(task.edge_index, 30))
        with torch.no_grad():
            found.append(model(task))
    torch.testing.assert_close(found[1], found[0][order], atol=1e-5, rtol=1e-4)


def test_verdicts_are_rules():
    assert verdict([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], lower=True) == "better"
    assert verdict([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], lower=False) == "worse"
    assert verdict([0.1, 0.2, 0.45], [0.4, 0.5, 0.6], lower=True).startswith("no difference")
    assert verdict([0.1], [0.4], lower=True).startswith("too few")
    models = {
        name: [{"test": x} for x in values]
        for name, values in {"SAGE": (0.5, 0.5, 0.5), "GAT": (0.6, 0.6, 0.6)}.items()
    }
    assert comparisons("packages", models, "test", "SAGE", lower=False) == [
        ("packages: GAT against SAGE", "better (+10.0 points)")
    ]
    parts = {
        nodes: {"seconds": {"exact": exact, "ours": ours}}
        for nodes, exact, ours in ((64, 1.0, 2.0), (128, 4.0, 4.5), (256, 16.0, 8.0))
    }
    assert scaling_verdicts(parts)[0][1] == "from 256 nodes; 2 times as fast with 256"
    del parts[256]
    assert scaling_verdicts(parts)[0][1].startswith("not up to 128 nodes")


def test_tables_say_what_is_not_measured():
    part = {"test": 0.5, "parameters": 10, "cpu_seconds": 1.0}
    made = tables({"debian, SAGE, seed 0": part, "debian, GAT, seed 0": {**part, "test": 0.6}})
    assert [row[3] for row in made["debian"].rows[:2]] == ["50.0%", "60.0%"]
    assert made["debian"].rows[1][5:7] == ("+10.0 points", "too few seeds to tell")
    assert {row[3] for row in made["molecules"].rows} == {"not measured"}
    answers = dict(made["verdicts"].rows)
    assert answers["packages: SAGE, ours against SAGE"] == "not measured"
    assert made["scaling"].rows == [("not measured",)]


def test_targets_and_split(molsets):
    pytest.importorskip("rdkit", reason="rdkit makes the molecules")
    from rdkit.Chem import MolFromSmiles
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    from studies.graphs.molecules import (
        chosen_smiles,
        penalised_logp,
        read_molecules,
        targets,
    )

    # Crippen has 0.3901 for a CH2; the easiest molecules have an accessibility of 1.
    for atoms, penalty in ((6, 0), (8, 2)):
        ring = MolFromSmiles(f"C1{'C' * (atoms - 1)}1")
        assert penalised_logp(ring) == pytest.approx(0.3901 * atoms - 1 - penalty)
    molecules = read_molecules(molsets, (20, 5, 5))
    assert [len(x) for x in molecules[:3]] == [20, 5, 5]
    assert math.isfinite(targets(molecules.train).sum())
    graph = molecules.train[0]
    assert graph.walks.shape == (graph.num_nodes, 16)
    scaffolds = {
        name: {MurckoScaffoldSmiles(mol=MolFromSmiles(x)) for x in lines}
        for name, lines in chosen_smiles(molsets, (20, 5, 5)).items()
    }
    assert not scaffolds["validation"] & scaffolds["test"]
