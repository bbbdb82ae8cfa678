"""Hidden residues from alignments: right where the answer is known."""

import numpy as np
import pytest

from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from studies.families.ceiling import (
    AlignedRows,
    aligned_residues,
    measure_ceiling,
    profile,
    substitutions,
    vote,
)
from studies.families.scored import TOKENIZER, draw_scored
from studies.families.synthetic import synthetic_families

UNIFORM = np.full(20, 0.05)


def families(count=3, members=4, identity=1.0):
    return synthetic_families(count, members=members, identity=identity, gaps=0.0)


def test_an_alignment_finds_its_way_around_gaps():
    found, identity = aligned_residues("MKTAYIAKQXQISFVKSHFSRQ", "MKTAYIAKQRQISFVKWWWSHFSRQ")
    assert found[9] == "R"
    assert "".join(found[place] for place in range(22)) == "MKTAYIAKQRQISFVKSHFSRQ"
    # Letters that BLOSUM62 does not have are read all the same.
    assert aligned_residues("MKTUYIAK", "MKTOYIAK")[0][3] == "O"
    assert identity == 1


def test_rows_of_aligned_relatives_hide_the_same_residues():
    proteins = synthetic_families(3, members=4, identity=0.8, gaps=0.05)
    scored = draw_scored(proteins, 6, 3, 100, 0)
    collate = scored.collator()
    shifted = []
    for index in scored.indices:
        given, aligned = scored.rows(3)[index], AlignedRows(scored, 3)[index]
        assert len(aligned["input_ids"]) <= AlignedRows(scored, 3).lengths[index]
        own = len(proteins.tokens[index])
        for key in ("input_ids", "labels"):
            rows = [collate([row])[key][0, -own:].tolist() for row in (given, aligned)]
            assert rows[0] == rows[1]
        # The nearest relative comes last; its residues are where the alignment has them.
        others, protein, _ = scored.letters(index)
        read = TOKENIZER.decode(aligned["input_ids"][:-own]).removesuffix("<eos>").split("<bos>")
        found, _ = aligned_residues(protein, others[0])
        assert {place: x for place, x in enumerate(read[-1]) if x != "X"} == found
        shifted.append(read[-1] != others[0])
    assert any(shifted)


def test_votes():
    assert vote([]) is None
    assert vote([("A", 0.3), ("C", 0.9), ("C", 0.2)]) == "C"
    assert vote([("A", 0.3), ("C", 0.9)]) == "A"


def test_a_profile_is_a_distribution():
    np.testing.assert_allclose(profile([], UNIFORM), UNIFORM)
    one = profile([("W", 0.5)], UNIFORM)
    # (0.5 + 0.1 / 20) / 1.1
    assert one[AMINO_ACIDS.index("W")] == pytest.approx(0.505 / 1.1)
    assert one.sum() == pytest.approx(1)
    # The nearer relative counts for more; BLOSUM62 prefers I to W in the place of a V.
    both = profile([("W", 0.4), ("V", 0.9)], UNIFORM)
    assert AMINO_ACIDS[both.argmax()] == "V"
    far = profile([("V", 0.1)], UNIFORM)
    assert far[AMINO_ACIDS.index("I")] > far[AMINO_ACIDS.index("W")]
    np.testing.assert_allclose(substitutions().sum(1), 1)
    np.testing.assert_allclose(substitutions().diagonal(), 0)


def test_copies_give_all_residues_and_strangers_few():
    scored = draw_scored(families(), 6, 3, 100, 0)
    part = measure_ceiling(scored, (0, 1, 3))
    assert part["tokens"] == sum(len(scored.letters(index)[2]) for index in scored.indices)
    assert part["relatives"]["1"]["accuracy"] == part["relatives"]["3"]["vote"] == 1
    assert part["relatives"]["3"]["perplexity"] < 1.1
    assert part["relatives"]["0"]["aligned"] == 0
    assert part["relatives"]["0"]["accuracy"] < 0.3
    shuffled = families()
    shuffled = shuffled._replace(names=[f"g{n % 4}" for n in range(12)])
    strangers = measure_ceiling(draw_scored(shuffled, 6, 2, 100, 0), (1,))
    assert strangers["relatives"]["1"]["accuracy"] < 0.4


def test_more_relatives_help():
    found = measure_ceiling(draw_scored(families(2, 12, 0.36), 20, 11, 100, 0), (1, 11))
    one, many = (found["relatives"][k] for k in ("1", "11"))
    assert many["accuracy"] > one["accuracy"] + 0.1
    assert many["perplexity"] < one["perplexity"]


def test_what_is_scored():
    proteins = families(3, 5)
    scored = draw_scored(proteins, 6, 4, 100, 0)
    # In turns from each family.
    assert sorted(proteins.names[index] for index in scored.indices[:3]) == ["f0", "f1", "f2"]
    assert len(set(scored.indices)) == 6
    relatives, protein, hidden = scored.letters(scored.indices[0])
    assert len(relatives) == 4
    assert protein.count("X") == len(hidden) == round(0.15 * len(protein))
    restored = "".join(hidden.get(place, letter) for place, letter in enumerate(protein))
    assert set(relatives) == {restored}
    with pytest.raises(ValueError, match="no family has more than 5 members"):
        draw_scored(proteins, 6, 5, 100, 0)
