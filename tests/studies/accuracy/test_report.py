"""Figures of accuracy results, by what is drawn."""

from itertools import product

import pytest

from performers.benchmark.measure import Results
from performers.features import ESTIMATORS, PROJECTIONS
from studies.accuracy.kernel import MEASURES
from studies.accuracy.report import heads_figure, kernel_figure, models_figure


def kernel_rows(data=("isotropic 1", "anisotropic 2", "anisotropic 4")):
    names = ("data", "estimator", "projection", "num_features")
    ends = {"": 1.0, "_low": 0.5, "_high": 2.0}
    return [
        dict(zip(names, place, strict=True))
        | {f"{measure}{end}": x / place[-1] for measure in MEASURES for end, x in ends.items()}
        for place in product(data, ESTIMATORS, PROJECTIONS, (64, 16))
    ]


def heads_rows():
    rows = []
    for layer in (0, 1, "mean"):
        for setting in ("positive", "data_aware"):
            for count in (64, 256):
                rows.append({"layer": layer, "setting": setting, "num_features": count})
        rows.append({"layer": layer, "setting": "optimal", "num_features": 256})
    rows.append({"layer": "mean", "setting": "SDPA", "num_features": 0})
    for row in rows:
        row["error"] = 0.0 if row["setting"] == "SDPA" else 20 / row["num_features"]
        if row["layer"] == "mean":
            row |= {"seconds": 0.001 + row["num_features"] / 1e5, "front": True}
    return rows


def figure_of(draw, rows):
    return draw(Results("accuracy", {"num_features": 256}, {}, rows=rows))


def lines(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_the_kernel_has_the_papers_comparison_and_all_estimators_and_projections():
    axes = figure_of(kernel_figure, kernel_rows()).axes
    kinds = ("as in the paper", "estimators", "positive", "data_aware")
    titles = [f"isotropic 1: {kind}" for kind in kinds] * 2
    titles += ["anisotropic 2", "anisotropic 4", "", ""]
    assert [panel.get_title() for panel in axes] == titles
    assert list(lines(axes[0])) == [
        "trigonometric, gaussian",
        "trigonometric, orthogonal",
        "positive, gaussian",
        "positive, orthogonal",
    ]
    assert list(lines(axes[1])) == [name for name in ESTIMATORS if name != "trigonometric"]
    assert list(lines(axes[2])) == list(lines(axes[3])) == list(PROJECTIONS)
    assert lines(axes[2])["simplex"] == [1 / 16, 1 / 64]
    for panel in axes:
        if panel.get_title():
            assert panel.get_xscale() == panel.get_yscale() == "log"
            assert len(panel.collections) == len(panel.get_lines())
    labels = [panel.get_ylabel() for panel in axes[::4]]
    assert len(set(labels)) == 3


def test_what_failed_is_left_out():
    rows = kernel_rows(("isotropic 1",))
    for row in rows:
        if row["estimator"] == "optimal":
            row |= dict.fromkeys(key for key in row if key.startswith(MEASURES))
    drawn = lines(figure_of(kernel_figure, rows).axes[1])
    assert "optimal" not in drawn
    assert "sderf" in drawn


def test_heads_have_layers_counts_and_times():
    by_layer, by_count, by_time = figure_of(heads_figure, heads_rows()).axes
    assert lines(by_layer) == {name: [20 / 256] * 2 for name in ("positive", "data_aware")}
    assert lines(by_count)["positive"] == [20 / 64, 20 / 256]
    assert by_time.get_xlabel() == "milliseconds a call"
    points = [line for line in by_time.get_lines() if len(line.get_xdata()) == 1]
    assert len(points) == 5
    front = by_time.get_lines()[-1]
    assert list(front.get_xdata()) == pytest.approx([1.64, 1.64, 3.56, 3.56, 3.56])
    (exact,) = by_time.texts
    assert exact.get_position()[0] == pytest.approx(1.0)


def test_a_model_has_a_line_for_each_setting():
    rows = [
        {"setting": name, "layer": layer, "error": 0.1 * (layer + 1)}
        for name in ("positive", "data_aware")
        for layer in (0, 1, 2)
    ]
    rows.append({"setting": "positive", "layer": "final", "error": 0.3})
    (axes,) = figure_of(models_figure, rows).axes
    assert list(lines(axes)) == ["positive", "data_aware"]
    assert lines(axes)["data_aware"] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("draw", "rows"),
    [
        (kernel_figure, []),
        (heads_figure, [row for row in heads_rows() if row["layer"] == 0]),
        (models_figure, []),
    ],
)
def test_runs_that_were_cut_short_can_be_drawn(draw, rows, tmp_path):
    figure_of(draw, rows).savefig(tmp_path / "x.png", dpi=20)
    assert (tmp_path / "x.png").stat().st_size > 0
