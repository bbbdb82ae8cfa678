"""Rows of proteins with their relatives."""

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.families import FamilyRows, ProteinFamilies, header_families
from performers.proteins.inputs.objectives import ALL_HIDDEN, CausalCollator, MaskedCollator
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences

TOKENIZER = build_protein_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
# One letter a family, one length a member, so that a member is known by its residues.
MEMBERS = [
    (letter, 3 + n) for letter, count in zip("ACD", (6, 3, 1), strict=True) for n in range(count)
]
SEQUENCES = [letter * length for letter, length in MEMBERS]


def proteins(sequences=SEQUENCES):
    names = [sequence[0] for sequence in sequences]
    return ProteinFamilies(encode_sequences(TOKENIZER, sequences), names)


def members(example):
    """Sequences of a row, by its begin tokens alone."""
    tokens = example["input_ids"]
    return [
        TOKENIZER.decode(piece[piece > 4])
        for piece in np.split(tokens, np.flatnonzero(tokens == BOS))[1:]
    ]


def test_a_row_is_a_protein_after_its_relatives():
    rows = FamilyRows(proteins(), max_length=1000)
    assert len(rows) == len(SEQUENCES)
    for index, sequence in enumerate(SEQUENCES):
        found = members(rows[index])
        assert found[-1] == sequence
        family = [other for other in SEQUENCES if other[0] == sequence[0]]
        assert sorted(found) == sorted(family)
        assert (
            rows.lengths[index] == len(rows[index]["input_ids"]) == sum(len(x) + 2 for x in family)
        )


def test_some_proteins_are_read_alone():
    many = proteins([letter * length for letter in "ACDE" for length in range(3, 53)])
    rows = FamilyRows(many, max_length=1000, alone=0.3, seed=1)
    lone = [len(members(rows[index])) == 1 for index in range(len(rows))]
    assert 40 < sum(lone) < 80
    for index in range(len(rows)):
        assert lone[index] == (len(members(rows[7, index])) == 1)
        assert rows.lengths[index] >= len(rows[index]["input_ids"])
        assert not lone[index] or rows.lengths[index] == len(many.tokens[index])
    for share, size in ((0, 6), (1, 1)):
        assert len(members(FamilyRows(proteins(), max_length=1000, alone=share)[0])) == size


def test_order_changes_with_the_epoch_and_with_nothing_else():
    rows = FamilyRows(proteins(), max_length=1000, seed=3)
    again = FamilyRows(proteins(), max_length=1000, seed=3)
    orders = {tuple(members(rows[epoch, 0])) for epoch in range(8)}
    assert len(orders) > 4
    again[5, 2]
    for epoch in range(8):
        assert members(rows[epoch, 0]) == members(again[epoch, 0])
    other = FamilyRows(proteins(), max_length=1000, seed=4)
    assert {tuple(members(other[epoch, 0])) for epoch in range(8)} != orders


def test_positions_restart_and_budgets_hold():
    rows = FamilyRows(proteins(), max_length=20)
    for epoch in range(5):
        for index, sequence in enumerate(SEQUENCES):
            example = rows[epoch, index]
            tokens, positions = example["input_ids"], example["position_ids"]
            assert len(tokens) == rows.lengths[index] <= 20
            assert (positions == 0).tolist() == (tokens == BOS).tolist()
            assert bool(((np.diff(positions) == 1) | (positions[1:] == 0)).all())
            assert members(example)[-1] == sequence
            assert tokens[-1] == EOS


def test_long_proteins_are_read_in_windows():
    rows = FamilyRows(proteins(["A" * 30, "AC"]), max_length=20)
    assert rows.lengths.tolist() == [20, 20, 20]
    pieces = [rows[index]["input_ids"] for index in range(2)]
    assert np.concatenate([piece[-16:] for piece in pieces]).tolist() == [
        *encode_sequences(TOKENIZER, ["A" * 30])[0]
    ]


def test_fewer_relatives_are_the_last_of_more():
    rows = {n: FamilyRows(proteins(), max_length=1000, max_relatives=n) for n in (0, 1, 3)}
    for index in range(6):
        most = members(rows[3][index])
        assert members(rows[0][index]) == most[-1:]
        assert members(rows[1][index]) == most[-2:]
        assert all(len(rows[n][index]["input_ids"]) <= rows[n].lengths[index] for n in rows)


def test_relatives_of_others():
    known = proteins([sequence for sequence in SEQUENCES if sequence[0] != "C"])
    rows = FamilyRows(proteins(["A" * 20, "C" * 21]), max_length=1000, relatives=known)
    assert sorted(members(rows[0])) == sorted([*SEQUENCES[:6], "A" * 20])
    assert members(rows[1]) == ["C" * 21]


@pytest.mark.parametrize("hidden", ["all", "one"])
def test_masked_targets(hidden):
    rows = FamilyRows(proteins(), max_length=1000, hidden=hidden)
    collator = MaskedCollator(TOKENIZER, mask_probability=0.4, replaced=ALL_HIDDEN)
    batch = collator([rows[0, 0], rows[0, 6]])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "position_ids"}
    for row, size in enumerate((3, 3)):
        tokens = rows[0, (0, 6)[row]]["input_ids"]
        targets = (batch["labels"][row] != -100).nonzero().flatten().tolist()
        start = len(tokens) - size - 2
        residues = len(tokens) - 2 * int((tokens == BOS).sum())
        assert len(targets) == round(0.4 * (residues if hidden == "all" else size))
        if hidden == "one":
            assert all(place > start for place in targets)
        else:
            assert any(place < start for place in targets)
        assert all(batch["input_ids"][row, place] == TOKENIZER.mask_token_id for place in targets)


def test_targets_are_the_same_with_any_number_of_relatives():
    collator = MaskedCollator(TOKENIZER, mask_probability=0.4, replaced=ALL_HIDDEN)
    labels = []
    for n in (0, 1, 5):
        rows = FamilyRows(proteins(), max_length=1000, hidden="one", max_relatives=n)
        labels.append(collator([rows[0, 5]])["labels"][0, -10:].tolist())
    assert labels[0] == labels[1] == labels[2]


@pytest.mark.parametrize("hidden", ["all", "one"])
def test_causal_targets_leave_out_the_first_tokens(hidden):
    rows = FamilyRows(proteins(), max_length=1000, hidden=hidden)
    batch = CausalCollator(TOKENIZER)([rows[0, 0]])
    tokens, labels = batch["input_ids"][0], batch["labels"][0]
    wanted = tokens != BOS
    if hidden == "one":
        wanted[:-5] = False
    assert torch.equal(labels != -100, wanted)


def test_names_must_fit():
    with pytest.raises(ValueError, match="10 token sequences and 1 names"):
        FamilyRows(proteins()._replace(names=["A"]), max_length=100)
    with pytest.raises(ValueError, match="no row has two residues"):
        FamilyRows(proteins(["A"]), max_length=100)


def test_header_families():
    records = [
        ProteinRecord("p", "family=F labels=L", "MK"),
        ProteinRecord("q", "subfamily=G", "M"),
    ]
    assert header_families(records[:1]) == ["F"]
    with pytest.raises(UserError, match="'q' names no family"):
        header_families(records)
