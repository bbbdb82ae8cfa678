"""Masked and causal objectives: the rule, the statistics, and what randomness may depend on."""

import pickle

import numpy as np
import pytest
import torch

from performers.proteins.inputs.objectives import ALL_HIDDEN, CausalCollator, MaskedCollator
from performers.proteins.inputs.packing import TokenDataset
from performers.proteins.inputs.tokenizer import (
    AMINO_ACIDS,
    build_protein_tokenizer,
    encode_sequences,
)

TOKENIZER = build_protein_tokenizer(closed=True)
MASK, PAD, RESIDUES, AMINO = (
    TOKENIZER.mask_token_id,
    TOKENIZER.pad_token_id,
    range(5, 31),
    range(5, 25),
)


def proteins(count, seed=0, longest=60):
    random = np.random.default_rng(seed)
    letters = list(AMINO_ACIDS + "XU")
    texts = ["".join(random.choice(letters, size)) for size in random.integers(1, longest, count)]
    return encode_sequences(TOKENIZER, texts)


def examples(count=20, **options):
    return list(TokenDataset(proteins(count, **options)))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_masked_batch_has_the_documented_layout():
    batch = MaskedCollator(TOKENIZER)(examples())
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    originals = proteins(20)
    longest = max(tokens.size for tokens in originals)
    for tensor in batch.values():
        assert tensor.dtype == torch.int64
        assert tensor.shape == (20, longest)
    for i, tokens in enumerate(originals):
        padding = slice(tokens.size, None)
        here = np.arange(longest) < tokens.size
        assert batch["attention_mask"][i].tolist() == here.tolist()
        assert (batch["input_ids"][i, padding] == PAD).all()
        assert (batch["labels"][i, padding] == -100).all()
        chosen = batch["labels"][i, : tokens.size] != -100
        labels = batch["labels"][i, : tokens.size]
        original = torch.from_numpy(tokens.astype(np.int64))
        assert torch.equal(labels[chosen], original[chosen])
        assert torch.equal(batch["input_ids"][i, : tokens.size][~chosen], original[~chosen])
        assert not chosen[0]
        assert not chosen[-1], "special tokens are no targets"


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5, 1.0])
def test_the_number_of_targets_of_an_example(probability):
    batch = MaskedCollator(TOKENIZER, mask_probability=probability)(examples(200))
    residues = torch.tensor([tokens.size - 2 for tokens in proteins(200)])
    expected = (probability * residues + 0.5).floor().clamp(min=1)
    assert torch.equal((batch["labels"] != -100).sum(1), expected.long())


def test_eighty_ten_ten_within_four_standard_errors():
    dataset = TokenDataset(proteins(400, longest=400))
    collator = MaskedCollator(TOKENIZER, mask_probability=0.3)
    batch = collator([dataset[epoch, i] for epoch in range(3) for i in range(len(dataset))])
    chosen = batch["labels"] != -100
    before, after = batch["labels"][chosen], batch["input_ids"][chosen]
    n = before.numel()
    assert n > 50_000

    def near(share, expected):
        return abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5

    assert near((after == MASK).double().mean().item(), 0.8)
    # A random amino acid is the original one time in twenty, if that is one of the twenty.
    changed = (after != MASK) & (after != before)
    standard = (before < 25).double().mean().item()
    assert near(changed.double().mean().item(), 0.1 * (1 - standard / 20))
    drawn = after[changed]
    assert set(drawn.tolist()) == set(AMINO), "replacements are standard amino acids, all of them"
    counts = torch.bincount(drawn, minlength=31)[5:25].double()
    mean = counts.mean()
    assert ((counts - mean).abs() < 5 * mean.sqrt()).all()
    # Non-standard residues are targets like any other.
    assert set(before.tolist()) == {*AMINO, *TOKENIZER.convert_tokens_to_ids(["X", "U"])}


def test_every_position_is_a_target_equally_often():
    tokens = encode_sequences(TOKENIZER, ["A" * 20])[0]
    dataset = TokenDataset([tokens])
    batch = MaskedCollator(TOKENIZER)([dataset[epoch, 0] for epoch in range(4000)])
    often = (batch["labels"][:, 1:-1] != -100).double().mean(0)
    assert (often - 0.15).abs().max() < 4 * (0.15 * 0.85 / 4000) ** 0.5


def test_a_mask_is_a_function_of_seed_epoch_and_index_alone():
    dataset = TokenDataset(proteins(30))
    collator = MaskedCollator(TOKENIZER, seed=7)
    whole = collator([dataset[2, i] for i in range(30)])
    np.random.seed(0)
    torch.manual_seed(0)
    copy = pickle.loads(pickle.dumps(collator))
    for i in reversed(range(30)):
        alone = copy([dataset[2, i]])
        size = dataset.lengths[i]
        for key in ("input_ids", "labels"):
            assert torch.equal(alone[key][0], whole[key][i, :size])
    again = MaskedCollator(TOKENIZER, seed=7)([dataset[2, i] for i in range(30)])
    assert equal(again, whole)
    bare = [{"input_ids": tokens, "index": i} for i, tokens in enumerate(proteins(30))]
    assert equal(collator(bare), collator(list(dataset))), "without an epoch it is epoch 0"


def test_other_seeds_epochs_and_indices_give_other_masks():
    tokens = proteins(1, seed=3, longest=500)[0]
    dataset = TokenDataset([tokens, tokens])
    reference = MaskedCollator(TOKENIZER, seed=1)([dataset[0, 0]])
    for seed, key in [(2, (0, 0)), (1, (1, 0)), (1, (0, 1)), (0, (1, 0))]:
        assert not equal(MaskedCollator(TOKENIZER, seed=seed)([dataset[key]]), reference)


def test_inputs_of_any_integer_kind_are_left_alone():
    ids = [1, 5, 6, 7, 8, 9, 2]
    collator = MaskedCollator(TOKENIZER, mask_probability=0.5)
    results = []
    for tokens in (ids, np.array(ids, np.int16), np.array(ids), torch.tensor(ids)):
        results.append(collator([{"input_ids": tokens, "index": 3}]))
        assert list(map(int, tokens)) == ids
        assert CausalCollator(TOKENIZER)([{"input_ids": tokens}])["labels"].tolist() == [ids]
    assert all(equal(result, results[0]) for result in results)
    bare = MaskedCollator(TOKENIZER)([{"input_ids": [1, 2, 1, 3, 4], "index": 0}])
    assert (bare["labels"] == -100).all(), "a row without residues has no targets"
    assert bare["input_ids"].tolist() == [[1, 2, 1, 3, 4]]


def test_the_causal_batch_is_its_own_label():
    batch = CausalCollator(TOKENIZER)(examples())
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    here = batch["attention_mask"] == 1
    assert torch.equal(batch["labels"][here], batch["input_ids"][here])
    assert (batch["labels"][~here] == -100).all()
    assert (batch["input_ids"][~here] == PAD).all()
    assert here.sum(1).tolist() == [tokens.size for tokens in proteins(20)]


def test_packed_rows_keep_their_sequence_ids():
    tokens = encode_sequences(TOKENIZER, ["MK", "T", "LLV"])
    dataset = TokenDataset(tokens, max_length=8, packed=True)
    causal = CausalCollator(TOKENIZER)(list(dataset))
    assert causal["sequence_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0] * 4 + [-1] * 4]
    assert causal["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    first, second = causal["labels"].tolist()
    m, k, t, v = TOKENIZER.convert_tokens_to_ids(list("MKTV"))
    assert first == [1, m, k, 2, -100, t, 2, -100], "no target is predicted across sequences"
    assert second[2:] == [v, 2, -100, -100, -100, -100]
    masked = MaskedCollator(TOKENIZER)(list(dataset))
    assert torch.equal(masked["sequence_ids"], causal["sequence_ids"])


def test_all_hidden_masks_the_same_targets_and_shows_none():
    shown = MaskedCollator(TOKENIZER, seed=3)(examples(50))
    hidden = MaskedCollator(TOKENIZER, seed=3, replaced=ALL_HIDDEN)(examples(50))
    assert torch.equal(shown["labels"], hidden["labels"])
    targets = hidden["labels"] != -100
    assert (hidden["input_ids"][targets] == TOKENIZER.mask_token_id).all()
    assert (shown["input_ids"][targets] != TOKENIZER.mask_token_id).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_probability": 0.0}, "mask_probability"),
        ({"mask_probability": 1.5}, "mask_probability"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedCollator(TOKENIZER, **options)


def test_bad_examples_and_tokenizers_are_refused():
    collator = MaskedCollator(TOKENIZER)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        collator([{"input_ids": [1, 5, 2]}])
    packed = {"input_ids": [5], "index": 0, "sequence_ids": [0]}
    for mixed in (
        [packed, {"input_ids": [5], "index": 1}],
        [{"input_ids": [5], "index": 1}, packed],
    ):
        with pytest.raises(KeyError, match="sequence_ids"):
            collator(mixed)
    for token, kind in [("mask", MaskedCollator), ("pad", CausalCollator)]:
        bare = build_protein_tokenizer(closed=True)
        setattr(bare, f"{token}_token", None)
        with pytest.raises(ValueError, match=f"no {token} token"):
            kind(bare)
