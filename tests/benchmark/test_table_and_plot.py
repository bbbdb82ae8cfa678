"""Tables and figures of results, by what they show."""

import pytest

from performers.benchmark.cases.attention import ATTENTION
from performers.benchmark.cases.decode import DECODE
from performers.benchmark.cases.model import MODEL
from performers.benchmark.plot import benchmark_figure, conversion_figure
from performers.benchmark.table import nbytes, seconds


def attention_rows(skip=()):
    return [
        {
            "direction": direction,
            "passes": passes,
            "length": length,
            "contestant": name,
            "seconds": None if (name, length) in skip else length * 1e-6,
            "peak_bytes": length * 100,
        }
        for direction in ("bidirectional", "causal")
        for passes in ("forward", "forward+backward")
        for length in (512, 1024, 4096)
        for name in ("performers torch", "SDPA", "identity")
    ]


def lines(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_attention_has_a_panel_for_each_of_the_passes_and_one_for_memory():
    figure = benchmark_figure(ATTENTION, attention_rows(skip={("SDPA", 4096)}))
    assert [axes.get_title() for axes in figure.axes] == [
        f"{direction}, {passes}"
        for direction in ("bidirectional", "causal")
        for passes in ("forward", "forward+backward", "forward+backward")
    ]
    for axes in figure.axes:
        assert axes.get_xscale() == axes.get_yscale() == "log"
    drawn = lines(figure.axes[0])
    assert list(drawn) == ["performers torch", "SDPA", "X (identity)"]
    assert drawn["SDPA"] == [512e-6, 1024e-6]
    assert drawn["performers torch"] == pytest.approx([512e-6, 1024e-6, 4096e-6])
    assert lines(figure.axes[2])["SDPA"] == [51200, 102400, 409600]
    dashed = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_label() for line in dashed] == ["X (identity)"]


def test_what_is_not_positive_or_not_measured_is_left_out():
    rows = attention_rows()
    for row in rows:
        row["peak_bytes"] = None
        if row["contestant"] == "identity" and row["length"] == 512:
            row["seconds"] = -1e-6
    figure = benchmark_figure(ATTENTION, rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["seconds"] * 4
    assert len(lines(figure.axes[0])["X (identity)"]) == 2


def test_model_and_decode():
    model = [
        {"size": "small", "objective": "clm", "length": n, "attention": "exact"}
        | {"seconds": 0.1, "peak_bytes": 1000}
        for n in (64, 128)
    ]
    figure = benchmark_figure(MODEL, model)
    assert [axes.get_title() for axes in figure.axes] == ["training step, small model, clm"] * 2
    decode = [
        {"level": level, "context": n, "contestant": "performers torch"}
        | {"seconds": 1e-4, "state_bytes": 1000}
        for level in ("layer", "model")
        for n in (64, 128)
    ]
    figure = benchmark_figure(DECODE, decode)
    assert len(figure.axes) == 4
    assert lines(figure.axes[1])["performers torch"] == [1000, 1000]


@pytest.mark.parametrize("benchmark", [ATTENTION, MODEL, DECODE], ids=lambda x: x.name)
def test_nothing_measured_is_an_empty_figure(benchmark, tmp_path):
    benchmark_figure(benchmark, []).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_a_conversion_has_quality_beside_speed():
    names = ("original", "FAVOR+ alone", "converted")
    content = {
        "model": {"kind": "causal"},
        "options": {"transfer_steps": 10},
        "quality": [{"model": name, "perplexity": 9.0} for name in names],
        "training": {
            "history": [
                {"stage": "transfer", "step": 5, "loss": 1.0},
                {"stage": "transfer", "step": 10, "perplexity": 8.0},
                {"stage": "model", "step": 20, "perplexity": 7.0},
            ]
        },
        "speed": [
            {"length": n, "model": name, "seconds": n / 1000, "peak_bytes": None}
            for n in (64, 128)
            for name in ("original", "converted")
        ],
        "decoding": [],
    }
    quality, speed = conversion_figure(content).axes
    assert lines(quality)["converted"] == [9.0, 8.0, 7.0]
    assert list(quality.get_lines()[0].get_xdata()) == [0, 10, 30]
    assert quality.get_yscale() == "log"
    assert lines(speed) == {name: [0.064, 0.128] for name in ("converted", "original")}


def test_units():
    assert [seconds(x) for x in (None, 2.5, 0.0241, 3.2e-5, 4e-9)] == [
        "", "2.50 s", "24.1 ms", "32.0 µs", "4.00 ns",
    ]  # fmt: skip
    assert [nbytes(x) for x in (None, 12, 2048, 3 * 2**20, 5 * 2**30)] == [
        "", "12.0 B", "2.00 KiB", "3.00 MiB", "5.00 GiB",
    ]  # fmt: skip
