"""Figures of results, by what is drawn."""

import pytest

from performers.benchmark.figure import benchmark_figure
from performers.benchmark.results import Results


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


def figure_of(benchmark, rows):
    return benchmark_figure(Results(benchmark, (), (), {}, {}, rows=rows))


def lines(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_attention_has_a_panel_for_each_of_the_passes_and_one_for_memory():
    figure = figure_of("attention", attention_rows(skip={("SDPA", 4096)}))
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


def test_times_that_are_not_positive_are_left_out():
    rows = attention_rows()
    for row in rows:
        if row["contestant"] == "identity" and row["length"] == 512:
            row["seconds"] = -1e-6
    drawn = lines(figure_of("attention", rows).axes[0])
    assert len(drawn["X (identity)"]) == 2


def test_model_and_decode():
    model = [
        {"size": "small", "objective": "clm", "length": n, "attention": "exact"}
        | {"seconds": 0.1, "peak_bytes": 1000}
        for n in (64, 128)
    ]
    figure = figure_of("model", model)
    assert [axes.get_title() for axes in figure.axes] == ["training step, small model, clm"] * 2
    decode = [
        {"level": level, "context": n, "contestant": "performers torch"}
        | {"seconds": 1e-4, "state_bytes": 1000}
        for level in ("layer", "model")
        for n in (64, 128)
    ]
    figure = figure_of("decode", decode)
    assert len(figure.axes) == 4
    assert lines(figure.axes[1])["performers torch"] == [1000, 1000]


def test_memory_that_was_not_measured_has_no_panel():
    rows = attention_rows()
    for row in rows:
        row["peak_bytes"] = None
    figure = figure_of("attention", rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["seconds"] * 4


@pytest.mark.parametrize("benchmark", ["attention", "model", "decode"])
def test_nothing_measured_is_an_empty_figure(benchmark, tmp_path):
    figure_of(benchmark, []).savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_unknown_results():
    with pytest.raises(ValueError, match="must be of one of attention, model, decode; got cooking"):
        figure_of("cooking", [])
