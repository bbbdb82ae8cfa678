"""Metrics per residue, against direct computation, and the unigram baseline."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from performers.proteins.inputs.tokenizer import build_protein_tokenizer, residue_ids
from performers.proteins.scoring.metrics import ResidueMetrics

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
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (VOCABULARY, torch.float32),
        *((VOCABULARY, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        # Padded for speed.
        (64, torch.float32),
    ],
)
def test_equal_to_the_definition(is_causal, vocabulary, dtype):
    logits, labels = batch(0, vocabulary=vocabulary)
    metrics = ResidueMetrics(TOKENIZER, is_causal=is_causal)
    metrics.update(logits.to(dtype), labels)
    expected = by_hand(logits.to(dtype), labels, is_causal)
    assert metrics.compute() == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize(("counts", "expected"), [([2, 0, 1, 1], (0.5, 2**1.5)), ([0, 7], (1, 1))])
def test_the_baseline_of_known_counts(counts, expected):
    """The best constant prediction where residues occur so often."""
    labels = torch.from_numpy(np.repeat(residue_ids(TOKENIZER)[: len(counts)], counts))
    metrics = ResidueMetrics(TOKENIZER)
    metrics.update(torch.zeros(len(labels), VOCABULARY), labels)
    found = metrics.compute()
    assert (found["baseline_accuracy"], found["baseline_perplexity"]) == pytest.approx(expected)
