"""Adapters of other libraries, where they are installed."""

import pytest
import torch

from performers.benchmark import third_party
from performers.benchmark.checking import check
from performers.benchmark.contestants import contestants
from performers.benchmark.workload import Workload

LIBRARIES = {"performer-pytorch": "performer_pytorch", "fast-transformers": "fast_transformers"}


@pytest.mark.parametrize("features", ["softmax", "relu"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_it_runs_and_is_what_it_claims_to_be(name, is_causal, features, capsys):
    pytest.importorskip(LIBRARIES[name])
    workload = Workload(heads=2, head_dim=8, num_features=64, features=features)
    contestant = contestants()[name]
    assert contestant.absence is None
    check(contestant, workload, is_causal, backward=True)
    attend = contestant.build(workload, is_causal)
    query, key, _, _ = workload.inputs(40)
    ones = torch.ones_like(query)
    # Weights that sum to one, but for what is added to the normaliser.
    torch.testing.assert_close(attend(query, key, ones), ones, rtol=0, atol=0.1)
    steps = torch.arange(40.0)[:, None].expand_as(query)
    out = attend(query, key, steps)
    assert bool((out[:, :, 0] > 1).all()) != is_causal
    # The same projection in every call.
    assert torch.equal(out, attend(query, key, steps))
    assert capsys.readouterr().out == ""


def test_absent_libraries():
    assert third_party.absence("no_such_library_here") == "not installed"
    assert third_party.absence("torch") is None


def test_fla_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(third_party, "absence", lambda module: None)
    assert contestants()["fla"].absence.startswith("needs a GPU")
    with pytest.raises(RuntimeError, match="needs a GPU"):
        contestants()["fla"].build(Workload(), False)
