"""Decoding: what is kept of the context, and the steps from it."""

import pytest
import torch
from torch.nn import functional as F

from performers import backends, favor_attention
from performers.benchmark.cases import decode
from performers.benchmark.cases.decode import DECODE, ExactDecoder, FavorDecoder
from performers.benchmark.cases.inputs import make_features
from performers.benchmark.settings import DecodeSettings, Shape, Workload
from tests.benchmark import runs
from tests.benchmark.runs import break_backend, failed, measured

WORKLOAD = Workload(heads=2, head_dim=8, num_features=16)
TINY = {
    "heads": 2,
    "head_dim": 8,
    "num_features": 16,
    "contexts": (16, 32, 64),
    "tokens": 3,
    "repeats": 2,
    "min_time": 0.0,
}


def run_small(earlier=None, **changes):
    return runs.run_small(DECODE, DecodeSettings(**{**TINY, **changes}), earlier)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(decode, "_PREFILL", 10)
    monkeypatch.setattr(decode, "_MODEL_PREFILL", 10)


def recorded(decoder, contexts):
    """All inputs of a decoder that was extended so, and twice those of its next token."""
    fresh = decode._Layer(WORKLOAD)
    pieces = [piece for context in contexts for piece in fresh._pieces(context)]
    token = decoder._token
    return [
        torch.cat([*(piece[i] for piece in pieces), token[i], token[i]], dim=2) for i in range(3)
    ]


@pytest.mark.parametrize("kind", ["favor", "exact"])
def test_steps_are_the_last_rows_of_the_whole_sequence(kind, short_pieces):
    decoder = FavorDecoder(WORKLOAD, "torch") if kind == "favor" else ExactDecoder(WORKLOAD)
    decoder.extend(13)
    next(decoder.steps(2))
    decoder.extend(25)
    query, key, value = recorded(decoder, (13, 25))
    assert query.shape[2] == 27
    if kind == "favor":
        whole = favor_attention(query, key, value, make_features(WORKLOAD), is_causal=True)
    else:
        whole = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    for _ in range(2):
        steps = torch.cat(list(decoder.steps(2)), dim=2)
        torch.testing.assert_close(steps, whole[:, :, -2:], rtol=0, atol=1e-5)


def test_a_state_keeps_its_size_and_a_cache_grows():
    favor, exact = FavorDecoder(WORKLOAD, "torch"), ExactDecoder(WORKLOAD)
    sizes = []
    for context in (10, 20):
        for decoder in (favor, exact):
            decoder.extend(context)
            next(decoder.steps(5))
        sizes.append((favor.nbytes, exact.nbytes))
    assert sizes[0][0] == sizes[1][0] == 2 * 16 * (8 + 1 + 1) * 4
    assert [size[1] for size in sizes] == [2 * 2 * 8 * 4 * context for context in (10, 20)]


@pytest.mark.parametrize("attention", ["favor-softmax", "exact"])
def test_a_models_cache_holds_the_context(attention, short_pieces, monkeypatch):
    monkeypatch.setattr(decode, "_REALLY_READ", 3)
    decoder = decode._model_decoder(Shape(size="small", num_features=16), attention)
    sizes = []
    for context in (7, 24):
        decoder.extend(context)
        sizes.append(decoder.nbytes)
        for _ in range(2):
            assert [step.shape for step in decoder.steps(2)] == [(1, 1, 256)] * 2
    if attention == "exact":
        assert sizes == [6 * 2 * 64 * 4 * context for context in (7, 24)]
    else:
        assert sizes[0] == sizes[1] == 6 * 16 * (64 + 2) * 4


def test_rows_and_ratios():
    results = run_small()
    names = [f"performers {name}" for name in backends() if name != "reference"]
    names.append("exact KV cache")
    assert measured(results.rows) == results.rows
    assert [(row["context"], row["contestant"]) for row in results.rows] == [
        (context, name) for context in TINY["contexts"] for name in names
    ]
    by_name = {(row["context"], row["contestant"]): row for row in results.rows}
    for row in results.rows:
        assert row["level"] == "layer"
        first = by_name[16, row["contestant"]]
        assert row["over_shortest_context"] == row["seconds"] / first["seconds"]
        exact = by_name[row["context"], "exact KV cache"]
        assert row["exact_ratio"] == exact["seconds"] / row["seconds"]
        assert row["state_bytes"] > 0


def test_through_a_model(monkeypatch):
    monkeypatch.setattr(decode, "Shape", lambda **more: Shape(size="small"))
    results = run_small(through_model=True, contexts=(8, 16))
    model = [row for row in results.rows if row["level"] == "model"]
    assert [(row["context"], row["contestant"]) for row in model] == [
        (context, name) for context in (8, 16) for name in ("model favor-softmax", "model exact")
    ]
    assert measured(model) == model


def test_a_backend_that_forgets_is_not_timed(monkeypatch):
    def attend(right, call):
        return right(call.replaced(state=None))

    break_backend(monkeypatch, "torch", attend)
    results = run_small(contexts=(16,))
    assert [row["contestant"] for row in failed(results.rows)] == ["performers torch"]
    assert "token 1 after the context differs" in failed(results.rows)[0]["reason"]


def test_resuming_skips_a_level_that_is_there():
    first = run_small()
    again = run_small(first.content())
    assert again.rows == first.rows
    assert again.saves == []
