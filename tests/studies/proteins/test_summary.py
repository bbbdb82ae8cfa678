"""Means, standard deviations and verdicts are those of the results."""

import re

import numpy as np
import pytest

from performers.app.files import read_json, write_json
from studies.proteins import runs
from studies.proteins.report import tables, write_report
from studies.proteins.summary import claims, paired_interval, spread, spread_text, summarise
from tests.studies.proteins.tiny import PRESET, data

TOKENS = [20] * 50


def counts(accuracy):
    """Correct predictions of 50 sequences of 20 residues, most of them in the first."""
    correct = round(accuracy * sum(TOKENS))
    return [correct // 50 + (number < correct % 50) for number in range(50)]


def result(attention, seed, test, ood=0.1, objective="mlm"):
    scores = {
        split: {
            "accuracy": value,
            "correct_by_sequence": counts(value),
            "tokens_by_sequence": TOKENS,
            "perplexity": 1 / value,
            "baseline_accuracy": 0.09,
            "baseline_perplexity": 18.0,
        }
        for split, value in (("test", test), ("ood", ood))
    }
    return {
        "experiment": "comparison",
        "attention": attention,
        "objective": objective,
        "seed": seed,
        "parameters": 1000,
        "steps": 5,
        "seconds": 10.0 + seed,
        "scores": scores,
    }


def test_mean_and_standard_deviation():
    found = spread({2: 3.0, 0: 1.0, 1: 5.0})
    assert (found["mean"], found["sd"], found["seeds"]) == (3.0, 2.0, 3)
    assert spread_text(found) == "3.00 ± 2.00"
    assert spread_text(spread({0: 0.5}), 1, 100) == "50.0"


def test_rows_are_grouped_and_ordered():
    found = [
        result("favor-relu", 0, 0.3, objective="clm"),
        result("exact", 1, 0.22),
        result("exact", 0, 0.2),
        result("favor-relu", 0, 0.25),
    ]
    rows = summarise(found, ("favor-relu", "exact"))
    names = [(row["objective"], row["attention"]) for row in rows]
    assert names == [("mlm", "favor-relu"), ("mlm", "exact"), ("clm", "favor-relu")]
    assert rows[1]["scores"]["test"]["accuracy"]["values"] == {0: 0.2, 1: 0.22}
    assert rows[1]["seconds"]["mean"] == 10.5
    table = tables({"summary": rows})["accuracy"]
    assert table.rows[0][:3] == ["masked", "unigram baseline", "9.00"]
    assert table.rows[2][:3] == ["masked", "Transformer", "21.00 ± 1.41"]
    assert len(table.rows) == 5
    assert table.markdown().count("\n| ") == 6


@pytest.mark.parametrize(
    ("relu", "verdict"),
    [
        ((0.36, 0.37, 0.38), "holds"),
        ((0.27, 0.26, 0.28), "does not hold"),
        ((0.36, 0.25, 0.30), "undecided"),
        ((0.30, 0.30, 0.30), "holds"),
        ((0.36,), "none: one seed"),
        ((0.08, 0.08, 0.08), "none: favor-relu is not above the frequency baseline"),
    ],
)
def test_claims_are_judged_by_paired_differences(relu, verdict):
    found = [result("exact", seed, 0.30) for seed in range(3)]
    found += [result("favor-relu", seed, value) for seed, value in enumerate(relu)]
    claim = next(
        c for c in claims(summarise(found, ("exact", "favor-relu"))) if "at least" in c["claim"]
    )
    mean = sum(relu) / len(relu)
    assert claim["difference"]["mean"] == pytest.approx(100 * (mean - 0.3))
    assert claim["verdict"] == verdict
    assert claim["difference"]["seeds"] == len(relu)
    low, high = claim["interval"]
    assert low <= claim["difference"]["mean"] <= high
    (row,) = [row for row in tables({"claims": [claim]})["claims"].rows if row[0] == claim["claim"]]
    assert row[2] == f"{low:+.2f} to {high:+.2f}"


def test_the_interval_is_that_of_a_bootstrap_over_sequences_and_seeds():
    """On many sequences of the same length it is the normal one of their spread."""
    random = np.random.default_rng(1)
    tokens = np.full(2000, 30)
    won = random.binomial(30, 0.3, 2000), random.binomial(30, 0.25, 2000)
    low, high = paired_interval({0: (won[0], tokens)}, {0: (won[1], tokens)})
    shares = 100 * (won[0] - won[1]) / 30
    error = shares.std() / 2000**0.5
    assert (low + high) / 2 == pytest.approx(shares.mean(), abs=0.2 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    # A second seed that differs from the first widens it, and sequences shared by both do not.
    apart = {0: (won[0], tokens), 1: (won[1], tokens)}, dict.fromkeys((0, 1), (won[1], tokens))
    low, high = paired_interval(*apart)
    assert low < 0.5
    assert high > shares.mean() - 0.5
    same = paired_interval(*(dict.fromkeys((0, 1), (w, tokens)) for w in won))
    assert same[1] - same[0] == pytest.approx(2 * 1.96 * error, rel=0.1)
    with pytest.raises(ValueError, match="same targets"):
        paired_interval({0: (won[0], tokens)}, {0: (won[1], tokens + 1)})


def test_a_tie_puts_no_one_ahead():
    names = ("exact", "favor-relu", "favor-softmax", "lsh", "linformer")
    found = [result(name, seed, 0.3, 0.3) for name in names for seed in range(3)]
    judged = claims(summarise(found, names))
    assert len(judged) == 8
    for claim in judged:
        tie_is_enough = "at least" in claim["claim"] or "within half a point" in claim["claim"]
        assert claim["verdict"] == ("holds" if tie_is_enough else "does not hold"), claim["claim"]
    asked = {row[0]: row[3] for row in tables({"claims": judged})["claims"].rows}
    assert asked["masked: Reformer below the Transformer, test"] == "> 0"
    assert asked["masked: Performer-ReLU at least as accurate as the Transformer, test"] == "≥ 0"


def test_runs_without_scores_by_sequence_give_no_verdict():
    found = [result(name, seed, 0.3) for name in ("exact", "lsh") for seed in range(3)]
    for run in found:
        for scores in run["scores"].values():
            del scores["correct_by_sequence"], scores["tokens_by_sequence"]
    (claim,) = claims(summarise(found, ("exact", "lsh")))
    assert claim["verdict"] == "none: no scores by sequence"
    assert "95% interval" not in tables({"claims": [claim]})["claims"].columns


def test_the_similarity_table_has_attention_and_embeddings_where_there_are_any():
    part = {"matrices": {"BLOSUM62": {"pearson": 0.5, "spearman": 0.4, "p_value": 0.01}}}
    counted = {"threshold": 0.1, "all": {**part, "heads": 6}, "thresholded": {**part, "heads": 5}}
    models = {
        "exact": {"problem": "", "similarity": counted, "embeddings": part},
        "favor-relu": {"problem": "", "similarity": counted},
        "lsh": {"problem": "no attention", "similarity": None, "embeddings": part},
    }
    made = tables({"learnt": {"models": models}})
    assert list(made) == ["similarity"]
    rows = [tuple(row[:3]) for row in made["similarity"].rows]
    both = [("attention", "BLOSUM62"), ("attention above 0.1", "BLOSUM62")]
    assert rows == [
        *(("Transformer", *kind) for kind in [*both, ("embeddings", "BLOSUM62")]),
        *(("Performer-ReLU", *kind) for kind in both),
        ("Reformer (LSH)", "no attention", ""),
        ("Reformer (LSH)", "embeddings", "BLOSUM62"),
    ]


def test_only_seeds_of_both_sides_count():
    found = [result("exact", 0, 0.30), result("favor-relu", 1, 0.9), result("favor-relu", 0, 0.29)]
    claim = claims(summarise(found, ("exact", "favor-relu")))[0]
    assert claim["difference"]["mean"] == pytest.approx(-1.0)
    assert claim["difference"]["sd"] is None


def test_failures_stand_in_the_tables():
    plan = {
        "performer": {"options": {"num_layers": 6, "steps": 9}, "cost": cost(1.5, 2**31)},
        "transformer": {"options": None, "cost": cost(None, None, "out of memory")},
    }
    table = tables({"plan": plan})["concatenated"]
    assert table.rows[0] == ["performer", "1.50", "2.00 GiB", "6", "9"]
    assert table.rows[1][1] == "out of memory"
    rows = [
        {"attention": "exact", "length": 8, **cost(1.0, 2**30)},
        {"attention": "favor-relu", "length": 16, **cost(None, None, "no result after 3 s")},
    ]
    table = tables({"contexts": rows})["contexts"]
    assert table.rows == [
        ["8", "1.00 s, 1.00 GiB", "–"],
        ["16", "–", "no result after 3 s"],
    ]


def test_a_page_is_made_of_the_files_of_a_study(tmp_path):
    runs._check_same(tmp_path / "study.json", PRESET, data(), "tiny")
    done = [result(name, seed, 0.2) for name in ("exact", "favor-relu") for seed in (0, 1)]
    done.append({**result("favor-exp", 0, 0.22), "experiment": "kernels"})
    failed = {"attention": "linformer", "objective": "mlm", "seed": 0, "failure": "nan; lower"}
    done.append({"experiment": "comparison", **failed})
    for number, content in enumerate(done):
        write_json(tmp_path / "runs" / str(number) / "result.json", content)
    rows = [{"attention": "exact", "length": 8, **cost(1.0, 2**30)}]
    write_json(tmp_path / "contexts.json", {"rows": rows})
    page = write_report(tmp_path).read_text()
    made = tables(read_json(tmp_path / "results.json"))
    assert list(made) == ["accuracy", "claims", "kernels", "contexts"]
    assert all(table.markdown() in page for table in made.values())
    assert "4 of 10 runs" in page
    assert "Linformer, masked, seed 0: no result; nan." in page
    for picture in re.findall(r"\]\((.+?)\)", page):
        assert (tmp_path / picture).exists()


def cost(seconds, nbytes, failure=""):
    return {"seconds": seconds, "peak_bytes": nbytes, "failure": failure}
