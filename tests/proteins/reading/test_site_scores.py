"""The attention that known sites receive, against uniform attention and random sets."""

import math

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.reading.site_scores import header_sites, parse_sites, score_sites

LABELS = "ACDEFGHIKLMNPQRSTVWY" * 2


def maps(layers=2, heads=3, seed=0, labels=LABELS):
    generator = np.random.default_rng(seed)
    raw = generator.uniform(0.5, 1.5, size=(layers, heads, len(labels), len(labels)))
    return list(raw / raw.sum(-1, keepdims=True))


def test_uniform_attention_favours_nothing():
    n = len(LABELS)
    scores = score_sites([np.full((2, n, n), 1 / n)], LABELS, [1, 20])
    assert [site["enrichment"] for site in scores["sites"]] == pytest.approx([1.0, 1.0])
    assert scores["enrichment"] == scores["typical"] == pytest.approx(1.0)
    assert scores["p_value"] == 1.0
    causal = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    scores = score_sites([causal[None]], LABELS, [1, 20, n])
    assert [site["enrichment"] for site in scores["sites"]] == pytest.approx([1.0] * 3)


def test_a_head_that_looks_at_the_sites_is_found():
    layers = maps()
    favoured = layers[1][2]
    favoured[:, [4, 30]] *= 6
    favoured /= favoured.sum(1, keepdims=True)
    scores = score_sites(layers, LABELS, [5, 31, 99])
    assert scores["head"] == "2.3"
    assert scores["beyond"] == [99]
    assert scores["p_value"] < 0.01
    assert [site["residue"] for site in scores["sites"]] == [LABELS[4], LABELS[30]]
    for site, column in zip(scores["sites"], (4, 30), strict=True):
        share = favoured[:, column].sum() / favoured.sum()
        assert site["head"] == "2.3"
        assert site["share"] == pytest.approx(share)
        assert site["enrichment"] == pytest.approx(share * len(LABELS))
        assert site["rank"] <= 2
    assert scores["share"] == pytest.approx(sum(site["share"] for site in scores["sites"]))
    enrichments = [
        head[:, 4].sum() / head.sum() * len(LABELS) for layer in layers for head in layer
    ]
    assert scores["sites"][0]["mean_enrichment"] == pytest.approx(np.mean(enrichments))


def test_the_best_of_many_heads_is_no_evidence():
    """Sites of no importance look enriched in their best head; the p-value is not fooled."""
    p_values = []
    for seed in range(20):
        scores = score_sites(maps(4, 8, seed), LABELS, [3, 8], permutations=199)
        assert scores["typical"] > 1
        p_values.append(scores["p_value"])
    assert 0.25 < np.mean(p_values) < 0.75


def test_favouring_an_amino_acid_is_not_favouring_its_sites():
    """A head that reads cysteines gives any cysteines much, sites or not."""
    labels = "CADGEKLV" * 12
    cysteines = [place for place, letter in enumerate(labels) if letter == "C"]
    same, every = [], []
    for seed in range(20):
        layers = maps(2, 2, seed, labels)
        layers[1][0][:, cysteines] *= 6
        sites = [place + 1 for place in np.random.default_rng(seed).choice(cysteines, 3, False)]
        scores = score_sites(layers, labels, sites, permutations=199)
        assert scores["same_letters_sets"] == math.comb(12, 3)
        same.append(scores["same_letters_p_value"])
        every.append(scores["p_value"])
    assert max(every) < 0.05
    assert 0.25 < np.mean(same) < 0.75
    # Sites that stand out among the cysteines are still found.
    layers[0][1][:, cysteines[:3]] *= 6
    sites = [place + 1 for place in cysteines[:3]]
    scores = score_sites(layers, labels, sites, permutations=999)
    assert scores["same_letters_p_value"] < 0.02


def test_sets_have_the_letters_of_the_sites():
    """Of two letters, each is drawn as often as the sites have it."""
    attention = np.ones((1, 48, 48))
    # Two of the nine C and two of the nine H.
    attention[:, :, :4] *= 5
    scores = score_sites([attention], "CH" * 9 + "A" * 30, [1, 2], permutations=9_999)
    assert scores["same_letters_sets"] == 81
    assert scores["same_letters_p_value"] == pytest.approx(4 / 81, abs=0.01)
    # Of all pairs of residues, two C and two H among them, 6 receive as much.
    assert scores["p_value"] == pytest.approx(6 / math.comb(48, 2), abs=0.004)


def test_too_few_residues_of_a_letter_give_no_p_value():
    scores = score_sites(maps(), LABELS, [1, 2, 3], permutations=9)
    assert scores["same_letters_sets"] == 8
    assert math.isnan(scores["same_letters_p_value"])
    assert 0 < scores["p_value"] <= 1


def test_nothing_to_score():
    assert score_sites(maps(), LABELS, [99]) is None
    assert score_sites(maps(), LABELS, []) is None
    assert score_sites([np.zeros((2, len(LABELS), len(LABELS)))], LABELS, [1]) is None


def test_sites_are_read_from_text_and_headers():
    assert parse_sites("57, 195,102,57", 245) == (57, 102, 195)
    protein = ProteinRecord("P", "a protease sites=2,3 x", "MKVL")
    assert header_sites(protein) == (2, 3)
    assert header_sites(ProteinRecord("P", "websites=9", "MKVL")) == ()
    with pytest.raises(UserError, match=r"header of P must be residues .* from 1 to 2; got 3"):
        header_sites(ProteinRecord("P", protein.description, "MK"))
    with pytest.raises(UserError, match="--sites must be numbers"):
        parse_sites("5-9", 245)
