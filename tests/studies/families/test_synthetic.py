"""Synthetic families have the identity and the gaps that they were asked for."""

import numpy as np
import pytest

from studies.families.ceiling import measure_ceiling
from studies.families.scored import TOKENIZER, draw_scored
from studies.families.synthetic import synthetic_families


def pairs(proteins):
    return zip(proteins.tokens[::2], proteins.tokens[1::2], strict=True)


def test_identity_without_gaps():
    drawn = synthetic_families(200, identity=0.8, gaps=0.0)
    assert all(len(a) == len(b) for a, b in pairs(drawn))
    same = np.concatenate([a[1:-1] == b[1:-1] for a, b in pairs(drawn)])
    assert same.mean() == pytest.approx(0.8, abs=0.02)
    letters, counts = np.unique(np.concatenate(drawn.tokens), return_counts=True)
    assert len(letters) == 22
    assert counts[letters > TOKENIZER.mask_token_id].min() > 0.8 * counts.max() * 20 / 22


def test_gaps_move_residues():
    drawn = synthetic_families(200, identity=1.0, gaps=0.02)
    lengths = np.array([(len(a), len(b)) for a, b in pairs(drawn)])
    assert (lengths[:, 0] != lengths[:, 1]).mean() > 0.5
    # Insertions are as frequent as deletions.
    assert abs((lengths - 62).mean()) < 1
    scored = draw_scored(drawn, 40, 1, 200, 0)
    assert measure_ceiling(scored, (1,))["relatives"]["1"]["accuracy"] > 0.9


def test_the_seed_decides():
    one, same, other = (synthetic_families(3, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one.tokens, same.tokens, strict=True))
    assert not np.array_equal(one.tokens[0], other.tokens[0])
    assert one.names == ["f0", "f0", "f1", "f1", "f2", "f2"]
