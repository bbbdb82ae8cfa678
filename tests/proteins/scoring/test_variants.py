"""Log-odds of variants, against the model itself."""

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.tokenizer import encode_sequences, residue_ids
from performers.proteins.model import ProteinModel
from performers.proteins.scoring.variants import check_variant, parse_variant
from tests.proteins.runs import make_model
from tests.proteins.scoring.test_likelihood import read

PROTEIN = "MKTAYIAK"
VARIANTS = ["M1W", "A4V", "a4v", "K2K", "A4V:K8R", "K8R : A4V"]
RELATIVES = ["MRTAYLAK", "MKWAY"]


def model(tmp_path, objective="mlm", **options):
    return ProteinModel(*make_model(objective, **options), tmp_path)


@pytest.mark.parametrize("relatives", [[], RELATIVES])
@pytest.mark.parametrize("method", ["masked", "one-pass"])
def test_residues_are_hidden_one_at_a_time_and_odds_add_up(tmp_path, method, relatives):
    reader = model(tmp_path, position_window=1, max_length=40)
    tokens = encode_sequences(reader.tokenizer, [PROTEIN])[0]

    def odds(wild_type, position, mutant):
        row = tokens.copy()
        if method == "masked":
            row[position] = reader.tokenizer.mask_token_id
        predicted = read(reader.network, reader.tokenizer, row, relatives)[position]
        there, instead = residue_ids(reader.tokenizer, wild_type + mutant)
        return predicted[instead] - predicted[there]

    both = odds("A", 4, "V") + odds("K", 8, "R")
    expected = [odds("M", 1, "W"), odds("A", 4, "V"), odds("A", 4, "V"), 0, both, both]
    options = {"method": method, "batch_tokens": 25}
    if relatives:
        options["relatives"] = reader.relatives(relatives)
    found = reader.score_variants(PROTEIN, VARIANTS, **options)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    if method == "masked":
        substitutions = reader.score(
            [PROTEIN], substitutions=True, relatives=options.get("relatives")
        )[0].log_odds
        assert found[1] == pytest.approx(substitutions[3, 17], abs=1e-5)


def test_each_position_is_read_once(tmp_path):
    reader = model(tmp_path)
    rows = []
    reader.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    scorer = reader.variant_scorer(PROTEIN)
    for _ in range(2):
        scorer([parse_variant(variant) for variant in VARIANTS])
    assert sum(rows) == 4


@pytest.mark.parametrize("relatives", [[], RELATIVES])
def test_a_causal_model_compares_whole_proteins(tmp_path, relatives):
    reader = model(tmp_path, "clm")

    def log_likelihood(sequence):
        row = encode_sequences(reader.tokenizer, [sequence])[0]
        predicted = read(reader.network, reader.tokenizer, row, relatives)
        return sum(predicted[n, row[n + 1]] for n in range(len(sequence)))

    options = {"relatives": reader.relatives(relatives)} if relatives else {}
    found = reader.score_variants(PROTEIN, ["A4V", "A4V:K8R"], **options)
    own = log_likelihood(PROTEIN)
    expected = [log_likelihood("MKTVYIAK") - own, log_likelihood("MKTVYIAR") - own]
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A4", "is not a variant"),
        ("A04V", "is not a variant"),
        ("A4V:", "is not a variant"),
        ("p.A4V", "is not a variant"),
        ("A4X", "has X, none of the 20"),
        ("A4V:A4L", "changes a position twice"),
        ("A9V", "A9V is beyond the protein's 8 residues"),
        ("K2V:G4V", "expects G at position 4, where the protein has A"),
    ],
)
def test_what_is_no_variant(text, message):
    with pytest.raises(UserError, match=message):
        check_variant(parse_variant(text), PROTEIN)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="method is for masked models"):
        model(tmp_path, "clm").score_variants(PROTEIN, ["A4V"], method="masked")
    broken = model(tmp_path)
    with torch.no_grad():
        broken.network.lm_head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        broken.score_variants(PROTEIN, ["A4V"])
    with pytest.raises(UserError, match="expects G"):
        model(tmp_path).score_variants(PROTEIN, ["G4V"])
