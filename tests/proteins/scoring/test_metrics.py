"""Metrics per residue, against direct computation, and the unigram baseline."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performers.proteins.inputs.tokenizer import build_protein_tokenizer, residue_ids
from performers.proteins.scoring.metrics import ResidueMetrics, unigram_baseline

TOKENIZER = build_protein_tokenizer(closed=True)
VOCABULARY = len(TOKENIZER)
RESIDUES = set(residue_ids(TOKENIZER).tolist())


def batch(seed, rows=3, length=17, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, length, vocabulary, generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    return logits, labels


def by_hand(logits, labels, shift=False):
    """The metrics of one batch from their definition, position by position."""
    losses, hits, targets = [], 0, []
    for scores, row in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for t, target in enumerate(row):
            if target not in RESIDUES or (shift and t == 0):
                continue
            s = scores[t - 1] if shift else scores[t]
            losses.append(math.log(sum(math.exp(x) for x in s)) - s[target])
            hits += max(range(len(s)), key=s.__getitem__) == target
            targets.append(target)
    n = len(targets)
    shares = [count / n for count in Counter(targets).values()]
    return {
        "accuracy": hits / n,
        "perplexity": math.exp(sum(losses) / n),
        "loss": sum(losses) / n,
        "tokens": n,
        "baseline_accuracy": max(shares),
        "baseline_perplexity": math.exp(-sum(p * math.log(p) for p in shares)),
    }


@pytest.mark.parametrize("is_causal", [False, True])
def test_equal_to_the_definition(is_causal):
    logits, labels = batch(0)
    metrics = ResidueMetrics(TOKENIZER, is_causal=is_causal)
    metrics.update(logits, labels)
    assert metrics.compute() == pytest.approx(by_hand(logits, labels, is_causal), rel=1e-12)


def test_batches_of_any_shape_add_up():
    logits, labels = batch(1, rows=5)
    whole, parts = ResidueMetrics(TOKENIZER), ResidueMetrics(TOKENIZER)
    whole.update(logits, labels)
    parts.update(logits[:2], labels[:2])
    parts.update(logits[2], labels[2])
    parts.update(logits[3:, :4], labels[3:, :4])
    parts.update(logits[3:, 4:], labels[3:, 4:])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert parts.count == whole.count


def test_special_tokens_and_ignored_positions_do_not_count():
    logits, labels = batch(2)
    kept = torch.isin(labels, residue_ids_tensor())
    assert 0 < kept.sum() < (labels != -100).sum()
    only_residues = labels.masked_fill(~kept, -100)
    a, b = ResidueMetrics(TOKENIZER), ResidueMetrics(TOKENIZER)
    a.update(logits, labels)
    b.update(logits, only_residues)
    assert a.compute() == b.compute()
    assert a.target_counts[:5].sum() == 0


def residue_ids_tensor():
    return torch.from_numpy(residue_ids(TOKENIZER))


def test_the_causal_metric_does_not_cross_rows_or_use_the_last_logits():
    labels = torch.tensor([[1, 5, 6, 2, -100], [1, 7, 8, 9, 2]])
    logits = torch.full((2, 5, VOCABULARY), -50.0)
    for row, t in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        logits[row, t, labels[row, t + 1]] = 50.0
    metrics = ResidueMetrics(TOKENIZER, is_causal=True)
    metrics.update(logits, labels)
    result = metrics.compute()
    assert (result["accuracy"], result["tokens"]) == (1.0, 5)
    assert result["perplexity"] == pytest.approx(1)


def test_a_vocabulary_padded_for_speed_is_accepted():
    logits, labels = batch(3, vocabulary=64)
    metrics = ResidueMetrics(TOKENIZER)
    metrics.update(logits, labels)
    assert metrics.compute() == pytest.approx(by_hand(logits, labels), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_float64_whatever_the_logits(dtype):
    logits, labels = batch(4)
    logits = logits.to(dtype)
    metrics = ResidueMetrics(TOKENIZER)
    metrics.update(logits, labels)
    assert metrics.compute() == pytest.approx(by_hand(logits, labels), rel=1e-12)


def test_many_small_batches_lose_no_precision():
    metrics = ResidueMetrics(TOKENIZER)
    metrics.loss_sum = 1e9
    logits, labels = batch(5, rows=1, length=40)
    for _ in range(100):
        metrics.update(logits, labels)
    expected = 100 * by_hand(logits, labels)["loss"] * metrics.count / 100
    assert metrics.loss_sum - 1e9 == pytest.approx(expected, rel=1e-9)


def test_merging_in_any_way_is_one_pass_over_all():
    batches = [batch(seed) for seed in range(4)]
    whole = ResidueMetrics(TOKENIZER)
    processes = [ResidueMetrics(TOKENIZER) for _ in range(2)]
    for i, (logits, labels) in enumerate(batches):
        whole.update(logits, labels)
        processes[i % 2].update(logits, labels)
    reduced = ResidueMetrics(TOKENIZER)
    reduced.load_state_tensor(sum(process.state_tensor() for process in processes))
    merged = pickle.loads(pickle.dumps(processes[0]))
    merged.merge(processes[1])
    for result in (reduced.compute(), merged.compute()):
        assert result == pytest.approx(whole.compute(), rel=1e-12)
        assert result["tokens"] == whole.count
    assert reduced.target_counts.dtype == np.int64


def test_metrics_that_do_not_fit_do_not_merge():
    metrics = ResidueMetrics(TOKENIZER)
    with pytest.raises(ValueError, match="causal"):
        metrics.merge(ResidueMetrics(TOKENIZER, is_causal=True))
    with pytest.raises(ValueError, match="shape"):
        metrics.load_state_tensor(torch.zeros(7))


def test_bad_shapes_are_refused():
    metrics = ResidueMetrics(TOKENIZER)
    logits, labels = batch(6)
    for bad_logits, bad_labels in [
        (logits[:, :-1], labels),
        (logits, labels[0]),
        (torch.zeros(VOCABULARY), torch.tensor(5)),
    ]:
        with pytest.raises(ValueError, match="logits, labels"):
            metrics.update(bad_logits, bad_labels)
    with pytest.raises(ValueError, match="vocabulary"):
        metrics.update(logits[..., :-1], labels)


def test_no_target_and_overflow_and_nan():
    metrics = ResidueMetrics(TOKENIZER)
    metrics.update(torch.zeros(1, 3, VOCABULARY), torch.tensor([[1, -100, 2]]))
    with pytest.raises(ValueError, match="no residue"):
        metrics.compute()
    logits = torch.zeros(1, 1, VOCABULARY)
    logits[0, 0, 0] = 5000.0
    metrics.update(logits, torch.tensor([[5]]))
    assert metrics.compute()["perplexity"] == math.inf
    metrics.update(logits * math.nan, torch.tensor([[5]]))
    assert math.isnan(metrics.compute()["loss"])


def test_the_baseline_of_known_counts():
    result = unigram_baseline([2, 0, 1, 1])
    assert result["baseline_accuracy"] == 0.5
    assert result["baseline_perplexity"] == pytest.approx(2**1.5)
    assert unigram_baseline(np.array([0, 7]))["baseline_perplexity"] == pytest.approx(1)
    uniform = unigram_baseline([10**12] * 20)
    assert uniform["baseline_perplexity"] == pytest.approx(20)


@pytest.mark.parametrize("counts", [[], [0, 0], [2, -1], [math.nan], [math.inf, 1]])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        unigram_baseline(counts)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=26).filter(any))
def test_no_constant_prediction_beats_the_baseline(counts):
    result = unigram_baseline(counts)
    shares = np.array(counts) / sum(counts)
    assert 1 - 1e-12 <= result["baseline_perplexity"] <= np.count_nonzero(shares) * (1 + 1e-12)
    for rival in (
        np.full(len(counts), 1 / len(counts)),
        (shares + 0.01) / (1 + 0.01 * len(counts)),
    ):
        cross_entropy = -(shares * np.log(rival)).sum()
        assert math.log(result["baseline_perplexity"]) <= cross_entropy + 1e-12


def test_a_constant_model_scores_the_baseline():
    _, labels = batch(7, rows=20)
    metrics = ResidueMetrics(TOKENIZER)
    kept = labels[torch.isin(labels, residue_ids_tensor())]
    counts = torch.bincount(kept, minlength=VOCABULARY).double()
    metrics.update((counts / counts.sum()).log().expand(*labels.shape, -1), labels)
    result = metrics.compute()
    assert result["accuracy"] == pytest.approx(result["baseline_accuracy"])
    assert result["perplexity"] == pytest.approx(result["baseline_perplexity"])
