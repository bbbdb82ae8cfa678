"""Attention to relatives, against the attention matrices of the model."""

import numpy as np
import pytest
import torch

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import Relatives
from performers.proteins.reading.relative_shares import relative_shares
from performers.proteins.reading.residues import FOLDS
from tests.proteins.runs import make_model

PROTEIN = ProteinRecord("x", "", "MKTAYIAKQRAC")
OTHERS = [ProteinRecord(f"r{n}", "", s) for n, s in enumerate(["MRTAYLAK", "WWK", "MKSAYVAKQ"])]


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("mlm", {"attention": "exact"}),
        ("mlm", {"window": 1, "position_window": 1}),
        ("mlm", {"reversible": True}),
        ("clm", {"window": 2}),
    ],
    ids=str,
)
def test_shares_are_sums_of_the_attention_matrices(objective, options):
    model, tokenizer = make_model(objective, **options)
    model.double()
    rows = Relatives(OTHERS, tokenizer, 100).rows([PROTEIN])
    read = relative_shares(model, tokenizer, PROTEIN, rows)
    assert list(read.names) == ["r0", "r1", "r2"]
    assert read.shares.shape == (3, 12)
    example, start = rows[0], int(rows.starts[0])
    # In the row: r2, r1, r0, and the protein.
    ends = np.cumsum([0, 11, 5, 10])
    folds = np.array_split(np.random.default_rng(0).permutation(12), FOLDS)
    for fold in folds if objective == "mlm" else [np.arange(12)]:
        tokens = torch.from_numpy(example["input_ids"].astype(np.int64))[None]
        at = start + 1 + fold
        if objective == "mlm":
            tokens[0, at] = tokenizer.mask_token_id
        else:
            at = at - 1
        with torch.no_grad():
            matrices = model(
                tokens,
                attention_mask=torch.ones_like(tokens),
                position_ids=torch.from_numpy(example["position_ids"])[None],
                output_attentions=True,
            ).attentions
        matrix = torch.stack(matrices).mean((0, 1, 2))[at].numpy()
        for number, place in enumerate((2, 1, 0)):
            expected = matrix[:, ends[place] : ends[place + 1]].sum(1)
            np.testing.assert_allclose(read.shares[number, fold], expected, atol=1e-9)


def test_hooks_are_removed_and_results_repeat():
    model, tokenizer = make_model()
    rows = Relatives(OTHERS, tokenizer, 100).rows([PROTEIN])
    first = relative_shares(model, tokenizer, PROTEIN, rows)
    np.testing.assert_array_equal(
        relative_shares(model, tokenizer, PROTEIN, rows).shares, first.shares
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (first.shares > 0).all()
    assert (first.shares.sum(0) < 1).all()
