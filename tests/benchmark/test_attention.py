"""The attention benchmark: its rows, its gate, what it leaves out and why."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from performers.benchmark.cases import contestants
from performers.benchmark.cases.attention import ATTENTION, MATMULS, check
from performers.benchmark.cases.contestants import exact_flops, favor_flops, pass_flops
from performers.benchmark.cases.inputs import make_inputs
from performers.benchmark.measure import OtherRunError
from performers.benchmark.settings import DIRECTIONS, PASSES, AttentionSettings, Workload
from tests.benchmark.runs import TINY, break_backend, failed, measured, pick, read_csv, run_tiny

NAMES = TINY["contestants"]


@pytest.fixture(scope="module")
def results():
    return run_tiny()


def test_there_is_a_row_for_everything_asked(results):
    keys = [
        (row["direction"], row["passes"], row["length"], row["contestant"]) for row in results.rows
    ]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {
        (direction, passes, length, name)
        for direction in DIRECTIONS
        for passes in PASSES
        for length in TINY["lengths"]
        for name in NAMES
    }
    assert measured(results.rows) == results.rows
    assert results.saves == list(range(3, 25, 3))


def test_ratios_rates_and_shares_follow_from_the_medians(results):
    for row in results.rows:
        group = {key: row[key] for key in ("direction", "passes", "length")}
        sdpa = pick(results, contestant="SDPA", **group)
        assert row["sdpa_ratio"] == sdpa["seconds"] / row["seconds"]
        assert row["performer_pytorch_ratio"] is None
        assert 0 < row["fastest"] <= row["first_quartile"] <= row["seconds"]
        assert row["seconds"] <= row["third_quartile"]
        if row["contestant"] == "identity":
            assert row["flops"] is None
            continue
        assert math.isclose(row["gflops_per_second"] * 1e9 * row["seconds"], row["flops"])
        floor = results.notes["floor"]["flops_per_second"]
        assert math.isclose(row["floor_share"], row["flops"] / row["seconds"] / floor)
    forward = pick(
        results,
        direction="bidirectional",
        passes="forward",
        length=32,
        contestant="performers torch",
    )
    assert forward["flops"] == 2 * 8 * 32 * 16 * 8


def test_json_and_csv_agree(results):
    content = json.loads(json.dumps(results.content()))
    rows = read_csv(results.csv())
    assert len(rows) == len(content["rows"])
    for flat, row in zip(rows, content["rows"], strict=True):
        assert list(flat) == list(row)
        for key, value in row.items():
            assert flat[key] == ("" if value is None else str(value))
    assert content["settings"]["lengths"] == [16, 32]
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["floor"]["rates"]


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan", "error"])
def test_a_wrong_backend_is_not_timed(monkeypatch, wrong):
    def attend(right, call):
        if wrong == "error":
            raise ValueError("no such luck")
        out, state = right(call)
        if wrong == "gradient":
            return out.detach() + 0 * out + 0.5 * (out - out.detach()), state
        return out * {"value": 1.001, "nan": math.nan}[wrong], state

    break_backend(monkeypatch, "torch", attend)
    found = run_tiny(lengths=(16,))
    ours = [row for row in found.rows if row["contestant"] == "performers torch"]
    assert failed(found.rows) == ours
    assert len(ours) == 4
    words = {
        "value": "output differs from the reference by 0.001 of its norm",
        "gradient": "gradient of query differs from the reference by 0.5 of its norm",
        "nan": "output holds values that are not finite",
        "error": "ValueError: no such luck",
    }[wrong]
    for row in ours:
        assert words in row["reason"]
        assert row["seconds"] is row["sdpa_ratio"] is row["gflops_per_second"] is None
    assert len(measured(found.rows)) == 8


def test_results_that_stop_being_finite_at_a_longer_length_are_refused(monkeypatch):
    def attend(right, call):
        out, state = right(call)
        return out * (math.nan if call.key.shape[2] == 32 else 1.0), state

    break_backend(monkeypatch, "torch", attend)
    found = run_tiny(directions=("causal",), passes=("forward",))
    assert pick(found, contestant="performers torch", length=16)["status"] == "measured"
    assert pick(found, contestant="performers torch", length=32)["status"] == "failed"


def test_quadratic_attention_stops_where_it_is_told_and_says_so():
    found = run_tiny(max_exact_length=16)
    for row in found.rows:
        skipped = row["contestant"] == "SDPA" and row["length"] == 32
        assert row["status"] == ("skipped" if skipped else "measured")
        assert row["reason"] == ("longer than max_exact_length (16)" if skipped else None)
        assert (row["sdpa_ratio"] is None) == (row["length"] == 32)


def test_calls_predicted_to_take_too_long_are_skipped():
    found = run_tiny(max_seconds=1e-9, directions=("causal",), passes=("forward",))
    assert {row["status"] for row in found.rows if row["length"] == 16} == {"measured"}
    for row in found.rows:
        if row["length"] == 32:
            assert row["status"] == "skipped"
            assert "predicted" in row["reason"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (RuntimeError("not implemented for 'Half'"), "error"),
    ],
    ids=["memory", "other"],
)
def test_others_may_fail_without_ending_the_run(monkeypatch, error, status):
    def build(workload, is_causal):
        def attend(query, key, value):
            if query.shape[2] == 32:
                raise error
            return value.clone()

        return attend

    monkeypatch.setattr(contestants, "_sdpa", build)
    found = run_tiny(directions=("bidirectional",))
    for row in found.rows:
        hit = row["contestant"] == "SDPA" and row["length"] == 32
        assert row["status"] == (status if hit else "measured")
    assert failed(found.rows) == []


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(contestants, "absence", lambda module: "not installed")
    found = run_tiny(contestants=(), lengths=(16,), directions=("causal",), passes=("forward",))
    assert ATTENTION.absences(AttentionSettings()) == {
        **dict.fromkeys(("SDPA flash", "SDPA cuDNN"), "needs a GPU: --device cuda"),
        **dict.fromkeys(("performer-pytorch", "fast-transformers", "fla"), "not installed"),
    }
    assert [row["contestant"] for row in found.rows][-2:] == ["SDPA", "identity"]


def test_contestants_of_a_device(monkeypatch):
    monkeypatch.setattr(contestants, "absence", lambda module: None)
    monkeypatch.setattr(contestants, "backends", lambda: ("native", "triton", "torch", "reference"))
    here, gpu = contestants.contestants(), contestants.contestants("cuda")
    for name in ("SDPA flash", "SDPA cuDNN", "fla"):
        assert here[name].absence.startswith("needs a GPU")
        assert gpu[name].absence is None
    assert list(here)[:3] == ["performers native", "performers torch", "SDPA"]
    assert list(gpu)[:3] == ["performers triton", "performers torch", "SDPA"]
    with pytest.raises(RuntimeError, match="no bidirectional form"):
        gpu["fla"].build(Workload(), False)


def test_fla_is_called_with_features(monkeypatch):
    """Its operator, here by the formula, gives attention through the same features."""

    def chunk_linear_attn(q, k, v, scale, normalize):
        pairs = torch.einsum("bihm,bjhm->bhij", q, k).tril() * scale
        return torch.einsum("bhij,bjhd->bihd", pairs / pairs.sum(-1, keepdim=True), v), None

    operators = SimpleNamespace(chunk_linear_attn=chunk_linear_attn)
    monkeypatch.setattr(contestants, "_import", lambda name: operators)
    workload = Workload(heads=2, head_dim=8, num_features=64)
    query, key, value, _ = make_inputs(workload, 40)
    out = contestants.contestants()["fla"].build(workload, True)(query, key, value)
    expected = contestants.favor("reference", workload, True)(query, key, value)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", ["softmax", "relu"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("name", "module"),
    [("performer-pytorch", "performer_pytorch"), ("fast-transformers", "fast_transformers")],
)
def test_other_libraries_are_what_they_claim(name, module, is_causal, features, capsys):
    pytest.importorskip(module)
    workload = Workload(heads=2, head_dim=8, num_features=64, features=features)
    contestant = contestants.contestants()[name]
    check(contestant, workload, is_causal, backward=True)
    attend = contestant.build(workload, is_causal)
    query, key, _, _ = make_inputs(workload, 40)
    ones = torch.ones_like(query)
    # Weights that sum to one, but for what is added to the normaliser.
    torch.testing.assert_close(attend(query, key, ones), ones, rtol=0, atol=0.1)
    steps = torch.arange(40.0)[:, None].expand_as(query)
    out = attend(query, key, steps)
    assert bool((out[:, :, 0] > 1).all()) != is_causal
    # The same projection in every call.
    assert torch.equal(out, attend(query, key, steps))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("length", "chunk"), [(1000, 64), (40, 40)])
def test_operations_are_those_of_the_products(length, chunk):
    def product(rows, inner, columns):
        return 2 * rows * inner * columns

    shape = Workload(heads=2, head_dim=8, num_features=32, batch=3)
    linear = 2 * product(length, 8, 32) + product(32, length, 8) + product(length, 32, 8)
    assert favor_flops(shape, length, False) == 6 * linear
    squares = product(chunk, 32, chunk) + product(chunk, chunk, 8)
    added = favor_flops(shape, length, True) - favor_flops(shape, length, False)
    assert added == 6 * length / chunk * squares / 2
    exact = exact_flops(shape, length, False)
    assert exact == 2 * exact_flops(shape, length, True) == 6 * 2 * product(length, 8, length)
    assert [pass_flops(10, name) for name in PASSES] == [10, 30]


def test_between_matmuls_their_own_time_is_taken_off():
    found = run_tiny(between_matmuls=True, lengths=(16,), directions=("causal",))
    for passes in PASSES:
        alone = pick(found, passes=passes, contestant=MATMULS)
        assert alone["seconds"] == alone["whole_seconds"] > 0
        for name in NAMES:
            row = pick(found, passes=passes, contestant=name)
            assert row["seconds"] == row["whole_seconds"] - alone["seconds"]


def test_resuming_measures_only_what_is_missing(results):
    earlier = json.loads(json.dumps(results.content()))
    again = run_tiny(earlier, lengths=(16, 32, 64))
    assert again.rows[: len(results.rows)] == results.rows
    assert {row["length"] for row in again.rows[len(results.rows) :]} == {64}
    assert len(again.saves) == 4
    untouched = run_tiny(earlier)
    assert untouched.rows == results.rows
    assert untouched.saves == []


def test_a_group_with_a_new_contestant_is_measured_again_as_a_whole(results):
    fewer = json.loads(json.dumps(results.content()))
    fewer["rows"] = [row for row in fewer["rows"] if row["contestant"] != "identity"]
    again = run_tiny(fewer)
    assert len(again.rows) == len(results.rows)
    assert not any(row in fewer["rows"] for row in again.rows)


def test_results_made_in_another_way_are_not_resumed(results):
    earlier = json.loads(json.dumps(results.content()))
    for changes, words in (({"heads": 4}, "heads 2, this is 4"), ({"seed": 1}, "seed")):
        with pytest.raises(OtherRunError, match=words):
            run_tiny(earlier, **changes)
    earlier["machine"]["cpu"] = "abacus"
    with pytest.raises(OtherRunError, match="cpu 'abacus'"):
        run_tiny(earlier)
    with pytest.raises(OtherRunError, match="'model' benchmark"):
        run_tiny({"benchmark": "model"})


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "directions": ("causal",)},
        {"dtype": "float16", "features": "relu", "directions": ("bidirectional",)},
    ],
    ids=str,
)
def test_other_settings_pass_the_gate(changes):
    found = run_tiny(**changes, lengths=(16,), contestants=("performers torch",))
    assert [row["reason"] for row in found.rows] == [None] * 2


def test_threads_are_torchs_own_again_afterwards():
    before = torch.get_num_threads()
    found = run_tiny(
        threads=before + 1, lengths=(16,), passes=("forward",), contestants=("identity",)
    )
    assert found.machine["threads"] == before + 1
    assert torch.get_num_threads() == before
