"""Several models' attention on the same proteins, in numbers and figures."""

import json

import pytest

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.reading.learnt import finite
from studies.proteins.learnt import compare_learnt
from tests.proteins.runs import make_model, proteins

PROTEIN = ProteinRecord("enzyme", "", proteins(1, 30, 30)[0])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    models = {"performer": make_model(), "exact": make_model(attention="exact")}
    folder = tmp_path_factory.mktemp("figures") / "new"
    seen = []
    found = compare_learnt(
        models,
        proteins(6, 20, 38),
        PROTEIN,
        folder,
        max_sequences=800,
        max_length=512,
        progress=lambda name, done, total: seen.append((name, done, total)),
    )
    return found, folder, seen


def test_numbers_are_plain_and_complete(compared):
    found, folder, seen = compared
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found["models"]) == ["performer", "exact"]
    for numbers in found["models"].values():
        assert numbers["problem"] == ""
        assert numbers["protein"] == {"name": "enzyme", "length": 30, "read": 30}
        assert len(numbers["heads"]) == 4
        assert numbers["uniform"]["mean_distance"] == pytest.approx((30**2 - 1) / 90)
        similarity = numbers["similarity"]
        assert similarity["sequences"] == 6
        assert list(similarity["all"]["matrices"]) == ["BLOSUM62", "BLOSUM45", "BLOSUM80"]
        assert len(similarity["all"]["matrix"]) == 20
        embeddings = numbers["embeddings"]
        assert list(embeddings["matrices"]) == list(similarity["all"]["matrices"])
        assert embeddings["matrix"] != similarity["all"]["matrix"]
    heads = [numbers["heads"] for numbers in found["models"].values()]
    assert heads[0] != heads[1]
    assert {name for name, *_ in seen} == {"performer", "exact"}
    names = {"similarity", "heads", "attention, performer", "attention, exact"}
    assert set(found["figures"]) == names
    for name in found["figures"].values():
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_not_finite_is_none():
    nan, inf = float("nan"), float("inf")
    assert finite({"a": [nan, 1.5, (inf, "x")], "b": {"c": -inf, "d": 3}}) == {
        "a": [None, 1.5, [None, "x"]],
        "b": {"c": None, "d": 3},
    }
