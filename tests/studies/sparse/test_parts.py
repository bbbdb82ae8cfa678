"""Tasks, reach and verdicts of the study of sparse attention, against counts by hand."""

from dataclasses import replace

import pytest
import torch

from performers.convert.distillation.pretrained import load_model
from studies.accuracy.capture import capture_heads, exact_attention
from studies.sparse import report
from studies.sparse.attentions import (
    ALL,
    EXACT,
    FIXED,
    LOCAL,
    LONGFORMER,
    PATTERNS,
    PERFORMERS,
    STRIDED,
)
from studies.sparse.pretrained import Pretrained, PretrainedSize, pattern_attention
from studies.sparse.reach import ReachSize, keys_per_query, measure_reach
from studies.sparse.tasks import IGNORED, TASKS, majority, recall
from studies.sparse.training import Solver, TrainingSize
from tests.benchmark.tiny_models import words
from tests.convert.sentence_models import save_sentence_model


def test_a_label_of_recall_is_the_value_of_the_pair():
    tokens, labels = recall(20, 64, torch.Generator().manual_seed(0))
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = {key: value for key, value in row[:48] if value}
        assert len(pairs) == 8
        assert answers[:48] == [IGNORED] * 48
        for (key, value), answer in zip(row[48:], answers[48:], strict=True):
            assert value == 0
            assert pairs[key] == answer + 1


def test_a_label_of_majority_is_the_sign_of_a_count():
    tokens, labels = majority(20, 64, torch.Generator().manual_seed(0))
    assert (labels[:, 48:] != IGNORED).any()
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        ahead = 0
        for (kind, marked), answer in zip(row, answers, strict=True):
            ahead += marked * (1 if kind == 2 else -1)
            assert answer == (IGNORED if abs(ahead) < 4 else int(ahead > 0))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ALL)
def test_solvers_see_no_later_token(task, name):
    size = TrainingSize(length=24, keys=4)
    torch.manual_seed(0)
    model = Solver(name, 2, TASKS[task], size).eval()
    tokens, _ = TASKS[task].draw(2, 24, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 18:] = 1
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :18], after[:, :18])
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("name", "layers"),
    [(EXACT, 1), *((name, 1) for name in PERFORMERS), (STRIDED, 2), (LOCAL, 8), (FIXED, 2)],
)
def test_layers_to_reach_every_token(name, layers):
    """64 tokens with 8 keys: a window of 8 takes 63 / 8 layers."""
    found = measure_reach(name, ReachSize(length=64, keys=8, sources=64))
    assert found["layers"] == [layers]
    assert found["most"][0] <= layers


def test_keys_of_a_query():
    """Of a causal window: itself and eight before, fewer at the beginning."""
    mean = sum(min(i + 1, 9) for i in range(64)) / 64
    assert keys_per_query(LOCAL, 64, 8, is_causal=True) == pytest.approx(mean)
    assert keys_per_query(EXACT, 64, 8, is_causal=False) == 64
    counts = [keys_per_query(name, 512, 32, is_causal=False) for name in PATTERNS]
    assert max(counts) < 1.6 * min(counts)


def test_verdicts_follow_from_the_numbers():
    def trained(task, name, accuracies):
        return {
            f"{task}, {name}, depth {depth}, seed 0": {"accuracy": accuracy}
            for depth, accuracy in accuracies.items()
        }

    parts = {
        **trained("recall", EXACT, {1: 0.99}),
        **trained("recall", PERFORMERS[0], {1: 0.3, 2: 0.5}),
        **trained("recall", STRIDED, {1: 0.3, 2: 0.97}),
        **trained("majority", PERFORMERS[0], {1: 1.0}),
        **trained("majority", STRIDED, {1: 0.6, 2: 1.0}),
    }
    rows = {row[0].rpartition(": ")[2]: row[1] for row in report.tables(parts)["verdicts"].rows}
    assert rows["recall"].startswith("the reverse")
    assert rows["majority"] == "holds"
    times = {
        name: {"both": [seconds], "forward": [1.0], "processor": [1.0]}
        for name, seconds in ((EXACT, 4.0), *((name, 1.0) for name in ALL[1:]), (report.PLAIN, 1.0))
    }
    verdicts = report.tables({"times": times})["verdicts"].rows
    assert verdicts[0][1] == "refuted"
    times[LOCAL]["both"] = [5.0]
    assert report.tables({"times": times})["verdicts"].rows[0][1] == "holds in part"
    assert report.slope({"8": 1 / 8, "64": 1 / 64}) == pytest.approx(-1)


def test_a_pattern_that_sees_all_is_the_models_own_attention(tmp_path):
    path = save_sentence_model(tmp_path / "model", positions=64)
    (tmp_path / "text.txt").write_text(words(3000, 1))
    text = tmp_path / "text.txt"
    size = PretrainedSize(length=48, passages=1, keys=200, budgets=(8, 200), counts=(), layers=(0,))
    model = Pretrained(path, text, text, size)
    assert model.measure(LOCAL)["cosine"] == pytest.approx(1)
    found = model.errors(LONGFORMER)
    assert found["200"] < 1e-10 < found["8"]
    loaded = load_model(path)
    sample = capture_heads(loaded, model._passages(1, 1))[0]
    sample = replace(sample, scale=0.3, is_causal=True)
    out = pattern_attention(LOCAL, 48, 100)(sample)
    torch.testing.assert_close(out, exact_attention(sample))
