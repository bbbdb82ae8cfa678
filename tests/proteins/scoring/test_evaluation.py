"""Scores of a model, against the same sums written out sequence by sequence."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from performers.proteins.inputs.objectives import ALL_HIDDEN, MaskedCollator
from performers.proteins.inputs.tokenizer import (
    AMBIGUOUS,
    AMINO_ACIDS,
    build_protein_tokenizer,
    encode_sequences,
)
from performers.proteins.scoring.evaluation import ResidueMetrics, evaluate_model
from tests.proteins.runs import log_probabilities, make_model, proteins

KEYS = {
    "accuracy",
    "perplexity",
    "loss",
    "tokens",
    "baseline_accuracy",
    "baseline_perplexity",
    "sequences",
}


def windows(tokenizer, sequences, length):
    """Token windows, as a list of lists, of sequences with <bos> and <eos>."""
    for sequence in sequences:
        (tokens,) = encode_sequences(tokenizer, [sequence])
        yield from np.array_split(tokens, max(1, math.ceil(len(tokens) / length)))


def plain_scores(pairs, tokenizer):
    """Scores from (log-probabilities of one position, target id) pairs, residues only."""
    residues = set(tokenizer.convert_tokens_to_ids(list(AMINO_ACIDS + AMBIGUOUS)))
    scored = [(row, target) for row, target in pairs if target in residues]
    count = len(scored)
    loss = -sum(float(row[target]) for row, target in scored) / count
    shares = [n / count for n in Counter(target for _, target in scored).values()]
    return {
        "accuracy": sum(int(row.argmax()) == target for row, target in scored) / count,
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": count,
        "baseline_accuracy": max(shares),
        "baseline_perplexity": math.exp(-sum(p * math.log(p) for p in shares)),
    }


def causal_pairs(model, tokenizer, sequences, length):
    for window in windows(tokenizer, sequences, length):
        rows = log_probabilities(model, window)
        yield from zip(rows[:-1], window[1:].tolist(), strict=True)


def masked_pairs(model, tokenizer, sequences, length, **masking):
    collator = MaskedCollator(tokenizer, replaced=ALL_HIDDEN, **masking)
    for index, window in enumerate(windows(tokenizer, sequences, length)):
        batch = collator([{"input_ids": window, "index": index}])
        rows = log_probabilities(model, batch["input_ids"][0])
        for row, target in zip(rows, batch["labels"][0].tolist(), strict=True):
            if target != -100:
                yield row, target


@pytest.mark.parametrize(("attention", "length"), [("favor-softmax", 1024), ("exact", 17)])
def test_a_causal_model_predicts_every_residue_from_those_before(attention, length):
    model, tokenizer = make_model("clm", attention=attention)
    sequences = [*proteins(12), "MKXXBU", "A"]
    found = evaluate_model(model, tokenizer, sequences, max_length=length, batch_tokens=150)
    assert found.keys() == KEYS
    assert found.pop("sequences") == 14
    expected = plain_scores(causal_pairs(model, tokenizer, sequences, length), tokenizer)
    assert found == pytest.approx(expected, rel=1e-5)
    if length == 1024:
        assert found["tokens"] == sum(map(len, sequences))


@pytest.mark.parametrize("length", [1024, 17])
def test_a_masked_model_predicts_the_residues_hidden_from_it(length):
    model, tokenizer = make_model("mlm")
    sequences = proteins(12)
    masking = {"mask_probability": 0.3, "seed": 4}
    found = evaluate_model(
        model, tokenizer, sequences, max_length=length, batch_tokens=150, **masking
    )
    assert found.keys() == KEYS
    assert found.pop("sequences") == 12
    pairs = masked_pairs(model, tokenizer, sequences, length, **masking)
    assert found == pytest.approx(plain_scores(pairs, tokenizer), rel=1e-5)


def test_no_target_of_a_masked_model_is_visible():
    """A model that copies what it sees must not be credited with a single residue."""
    model, tokenizer = make_model("mlm")
    vocabulary = model.config.vocab_size

    class Copy(torch.nn.Module):
        config, device = model.config, torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            one_hot = torch.nn.functional.one_hot(input_ids, vocabulary).float()
            return type("Output", (), {"logits": 20 * one_hot})()

    assert evaluate_model(Copy(), tokenizer, proteins(20))["accuracy"] == 0


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_the_same_call_gives_the_same_numbers_whatever_the_batches(objective):
    model, tokenizer = make_model(objective)
    sequences = proteins(20)
    first = evaluate_model(model, tokenizer, sequences)
    assert evaluate_model(model, tokenizer, sequences) == first
    again = evaluate_model(model, tokenizer, sequences, batch_tokens=1)
    assert again == pytest.approx(first, rel=1e-6)
    others = [evaluate_model(model, tokenizer, sequences, seed=seed)["loss"] for seed in (1, 2)]
    assert len({first["loss"], *others}) == (3 if objective == "mlm" else 1)


def test_progress_counts_windows_to_the_end():
    model, tokenizer = make_model()
    seen = []
    evaluate_model(
        model,
        tokenizer,
        ["A" * 100, "MKT"],
        max_length=34,
        batch_tokens=34,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_model_and_the_random_state_are_left_as_they_were():
    model, tokenizer = make_model(hidden_dropout_prob=0.5)
    before = torch.random.get_rng_state()
    expected = evaluate_model(model, tokenizer, proteins(10))
    model.train()
    assert evaluate_model(model, tokenizer, proteins(10)) == expected, "dropout is off"
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        (["MKT"], {"mask_probability": 0.0}, "mask_probability"),
        (["MKT"], {"max_length": 0}, "max_length"),
        (["MKT"], {"seed": -1}, "seed"),
        ([], {}, "at least one row"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(sequences, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(*make_model(), sequences, **options)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_sequences_are_counted_apart(objective):
    model, tokenizer = make_model(objective)
    sequences = [*proteins(4, longest=30), "M" * 50]
    options = {"max_length": 40, "batch_tokens": 90}
    found = evaluate_model(model, tokenizer, sequences, by_sequence=True, **options)
    correct, tokens = found.pop("correct_by_sequence"), found.pop("tokens_by_sequence")
    assert found == evaluate_model(model, tokenizer, sequences, **options)
    assert sum(tokens) == found["tokens"]
    assert sum(correct) == round(found["accuracy"] * found["tokens"])
    if objective == "clm":
        alone = [evaluate_model(model, tokenizer, [letters], **options) for letters in sequences]
        assert tokens == [one["tokens"] for one in alone]
        assert correct == [round(one["accuracy"] * one["tokens"]) for one in alone]


@pytest.mark.parametrize(
    ("dtype", "unused"), [(torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 33)]
)
def test_sums_are_in_float64_and_unused_tokens_do_not_matter(dtype, unused):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 17, 31, generator=generator)
    labels = torch.randint(0, 31, (3, 17), generator=generator)
    exact, found = (
        ResidueMetrics(build_protein_tokenizer()),
        ResidueMetrics(build_protein_tokenizer()),
    )
    exact.update(logits.to(dtype).double(), labels)
    padded = torch.nn.functional.pad(logits.to(dtype), (0, unused), value=-math.inf)
    found.update(padded, labels)
    assert found.compute() == pytest.approx(exact.compute(), rel=1e-12)


def test_no_target_and_overflow_and_nan():
    metrics = ResidueMetrics(build_protein_tokenizer())
    metrics.update(torch.zeros(1, 3, 31), torch.tensor([[1, -100, 2]]))
    with pytest.raises(ValueError, match="no residue"):
        metrics.compute()
    logits = torch.zeros(1, 1, 31)
    logits[0, 0, 0] = 5000.0
    metrics.update(logits, torch.tensor([[5]]))
    assert metrics.compute()["perplexity"] == math.inf
    metrics.update(logits * math.nan, torch.tensor([[5]]))
    assert math.isnan(metrics.compute()["loss"])
