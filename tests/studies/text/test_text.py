"""The study of long text runs on small texts, goes on where it stopped, and refuses bad input."""

import json

import pytest
import torch

from performers.features.theory import log_relative_variance
from performers.models import PerformerConfig, PerformerForCausalLM
from performers.streams.text import read_bytes
from studies.text import contestants, redraw
from studies.text.__main__ import app
from studies.text.redraw import measure_draws
from tests.cli.commands import refusal
from tests.streams.texts import write_texts
from tests.studies import study

ONLY = "softmax,softmax_short,memory,fixed,long_every_5"


@pytest.fixture
def small(monkeypatch, tmp_path):
    sizes = {"hidden_size": 16, "num_features": 8, "batch_tokens": 64, "max_length": 64}
    monkeypatch.setattr(contestants, "CONTEXT", 64)
    monkeypatch.setitem(contestants.SHORT, "max_length", 16)
    monkeypatch.setitem(contestants.SHORT, "batch_tokens", 32)
    for name, value in sizes.items():
        monkeypatch.setitem(contestants.MODEL, name, value)
    memory = contestants.Contestant(
        "memory",
        "exact, memory",
        {"attention": "exact", "max_length": 16, "carry_state": True, "memory": 16},
    )
    both = [x for x in contestants.CONTESTANTS if x.name in ("softmax", "softmax_short")]
    monkeypatch.setattr(contestants, "CONTESTANTS", (*both, memory))
    write_texts(tmp_path / "novels", (300, 200))
    unseen = write_texts(tmp_path / "unseen", (150,))
    (unseen / "text0.txt").rename(unseen / "other.txt")
    return tmp_path


def arguments(folder, *more):
    times = ("--seconds", "0.01", "--redraw-seconds", "0.01", "--contexts", "2")
    return (folder / "novels", "--unseen", folder / "unseen", *times, "--only", *more)


def test_the_study_runs_and_goes_on(small):
    first, _ = study.run(app, small / "out", *arguments(small, ONLY))
    assert list(first["parts"]) == ONLY.split(",")
    assert first["parts"]["softmax"]["short_steps"] is None
    assert first["parts"]["softmax_short"]["short_steps"] >= 1
    part = first["parts"]["memory"]
    # Contexts of 64, 64 and 21 bytes, as many as hold about 128 together.
    assert part["tokens"] == 149
    assert len(part["places"]) == 16
    assert part["bits_per_byte"] != part["bits_per_byte_without_past"]
    assert first["parts"]["fixed"]["length"] == 16
    assert first["parts"]["long_every_5"]["length"] == 64
    assert first["tables"].keys() == {"bits", "places", "redraws", "variances"}
    stopped = dict(first["parts"])
    del stopped["long_every_5"]
    (small / "out" / "results.json").write_text(json.dumps({**first, "parts": stopped}))
    again, _ = study.run(app, small / "out", *arguments(small, ONLY, "--resume"))
    assert again["parts"] == first["parts"], "the trained model is kept and read again"


def test_what_cannot_be_compared_is_refused(small):
    given = arguments(small, "nobody", "--output", small / "out")
    assert "--only has no part 'nobody'" in refusal(*given, app=app)
    (small / "unseen" / "other.txt").rename(small / "unseen" / "text1.txt")
    assert "--unseen has files of NOVELS, such as text1.txt" in refusal(*given, app=app)


def test_draws_are_measured_on_the_models_own_queries_and_keys(small, monkeypatch):
    """The median and the mean are those of many pairs, computed without the study's hook."""
    torch.manual_seed(0)
    model = PerformerForCausalLM(
        PerformerConfig(
            vocab_size=256,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=16,
            initializer_range=0.5,
            pad_token_id=None,
        )
    ).eval()
    features = model.performer.layers[0].attention.mechanism.feature_map
    texts = read_bytes(sorted((small / "novels").iterdir()), print)
    seen = []
    found = measure_draws(model, texts, lambda: seen.append(features.version) or 0.0, 64)
    assert len(set(seen)) == 1 + redraw.FRESH
    taken = {}
    mechanism = model.performer.layers[0].attention.mechanism
    mechanism.register_forward_pre_hook(lambda module, inputs: taken.update(qk=inputs[:2]))
    with torch.no_grad():
        model(torch.from_numpy(texts.read(0, 0, 64))[None], use_cache=False)
    query, key = (x[0, 0] for x in taken["qk"])
    rows, columns = torch.tril_indices(64, 64)
    rows, columns = rows[rows >= 32], columns[rows >= 32]
    # A row is drawn first, then one of the keys up to it.
    weights = 1.0 / (rows + 1)
    norms = ((query[rows] + key[columns]) / 16**0.25).square().sum(-1)
    entry = found["layers"][0]
    assert entry["norm_random"] == pytest.approx(
        float((norms * weights).sum() / weights.sum()), rel=0.1
    )
    variance = log_relative_variance(features, query[rows], key[columns])
    order = variance.argsort()
    middle = torch.searchsorted(weights[order].cumsum(0) / weights.sum(), 0.5)
    assert entry["log_variance_random"] == pytest.approx(float(variance[order][middle]), rel=0.15)
    assert entry["norm_attended"] > entry["norm_random"]


def test_texts_that_end_before_the_last_place_have_no_number_there(monkeypatch):
    monkeypatch.setattr(contestants, "CONTEXT", 64)
    places = [{"start": 4 * number, "bits_per_byte": 2.5} for number in range(9)]
    part = {"title": "any", "length": 64, "bits_per_byte": 2.0, "places": places}
    part |= {"short_steps": None, "steps": 1}
    table = contestants.tables({"softmax": part})["places"]
    assert " ".join(table.columns[2:]) == "0–4 4–8 8–12 16–20 32–36 48–52 60–64"
    assert table.rows[0][2:] == ("2.500",) * 5 + ("–",) * 2
