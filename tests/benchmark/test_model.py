"""Training steps of models."""

from functools import partial

import pytest
import torch

from performers import backends
from performers.benchmark.cases.model import (
    MODEL,
    make_model,
    make_tokens,
    measure_peak,
    training_step,
)
from performers.benchmark.memory import run_apart
from performers.benchmark.settings import MODEL_ATTENTIONS, SIZES, ModelSettings, Shape
from tests.benchmark import runs
from tests.benchmark.runs import break_backend, failed, measured

TINY = {
    "size": "small",
    "lengths": (16, 32),
    "repeats": 2,
    "min_time": 0.0,
    "memory": False,
}


def run_small(**changes):
    return runs.run_small(MODEL, ModelSettings(**{**TINY, **changes}))


@pytest.mark.parametrize(("objective", "most"), [("clm", 32), ("mlm", 16)])
def test_rows_and_ratios(objective, most):
    """Exact attention stops where it is told."""
    results = run_small(objective=objective, max_exact_length=most)
    assert [(row["length"], row["attention"]) for row in results.rows] == [
        (length, name) for length in (16, 32) for name in MODEL_ATTENTIONS
    ]
    left = [row for row in results.rows if row["status"] == "skipped"]
    assert len(measured(results.rows)) + len(left) == len(results.rows)
    assert [(row["length"], row["attention"]) for row in left] == [(32, "exact")] * (most == 16)
    by_name = {(row["length"], row["attention"]): row for row in results.rows}
    for row in measured(results.rows):
        identity, exact = (by_name[row["length"], name] for name in ("identity", "exact"))
        assert row["over_identity"] == row["seconds"] / identity["seconds"]
        if exact["seconds"] is not None:
            assert row["exact_ratio"] == exact["seconds"] / row["seconds"]
        assert row["memory_over_identity"] is None


def test_the_models_are_the_papers():
    for size, (heads, layers, intermediate, hidden) in SIZES.items():
        config = make_model(Shape(size=size), "identity").config
        assert (config.num_attention_heads, config.num_hidden_layers) == (heads, layers)
        assert (config.intermediate_size, config.hidden_size) == (intermediate, hidden)
        assert config.vocab_size == 256
        assert config.is_decoder
    assert not make_model(Shape(objective="mlm", size="small"), "exact").config.is_decoder


def test_a_step_learns():
    step = training_step(Shape(size="small", dropout=0.0), "favor-softmax", 24)
    losses = [step() for _ in range(15)]
    assert losses[-1] < losses[0] - 0.5


def test_masked_labels_are_a_few_of_the_tokens():
    tokens, labels = make_tokens(Shape(objective="mlm", batch=4), 1000)
    chosen = labels != -100
    assert 0.12 < chosen.float().mean() < 0.18
    assert torch.equal(labels[chosen], tokens[chosen])


def test_a_model_on_a_wrong_backend_is_not_timed(monkeypatch):
    def attend(right, call):
        out, state = right(call)
        return out * 1.1, state

    break_backend(monkeypatch, backends()[0], attend)
    results = run_small(lengths=(16,))
    reasons = {row["attention"]: row["reason"] for row in failed(results.rows)}
    assert set(reasons) == {"favor-softmax", "favor-relu"}
    assert all("differs from the reference" in reason for reason in reasons.values())
    assert len(measured(results.rows)) == 2


@pytest.mark.exhaustive
def test_memory_of_a_step_holds_the_model_and_its_optimiser():
    parameters = sum(p.numel() for p in make_model(Shape(size="small"), "identity").parameters())
    probe = partial(measure_peak, Shape(size="small"), "identity", 512)
    # Weights, gradients and Adam's two moments.
    assert run_apart(probe, threads=1).nbytes > 4 * 4 * parameters
