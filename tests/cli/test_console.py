"""Progress and tables."""

import io

import pytest
from rich.console import Console

from performers.cli import console


@pytest.fixture
def shown(monkeypatch):
    def make(terminal):
        stream = io.StringIO()
        fake = Console(file=stream, force_terminal=terminal, width=100, highlight=False)
        monkeypatch.setattr(console, "messages", fake)
        return stream

    return make


def test_elsewhere_than_on_a_terminal_progress_is_a_line_a_tenth(shown):
    stream = shown(False)
    with console.ProgressBars() as bars:
        report = bars.task("training")
        for step in range(101):
            report(step, 100, {"loss": 3.0, "grad_norm": 1.0} if step == 15 else {})
            if step == 55:
                report(step, 100, {"eval_accuracy": 0.25})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "training: 10 of 100"
    assert lines[1] == "training: 20 of 100  loss 3.000"
    assert lines[9] == "training: 100 of 100  loss 3.000  validation accuracy 0.250"


def test_lines_say_how_much_time_is_left(shown, monkeypatch):
    stream, clock = shown(False), iter([0.0, 60.0, 120.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.ProgressBars() as bars:
        for done in (0, 40, 80):
            bars.task("demo")(done, 100)
    assert stream.getvalue().splitlines() == [
        "demo: 40 of 100  about 1 min 30 s left",
        "demo: 80 of 100  about 30 s left",
    ]


def test_on_a_terminal_it_is_a_bar(shown):
    stream = shown(True)
    with console.ProgressBars() as bars:
        bars.task("embedding")(3, 7)
    assert "embedding" in stream.getvalue()
    assert "3/7" in stream.getvalue()


def test_only_the_first_of_several_processes_speaks(shown, monkeypatch, capsys):
    stream = shown(False)
    monkeypatch.setenv("RANK", "1")
    with console.ProgressBars() as bars:
        bars.task("embedding")(7, 7)
        bars.task("training")(7, 7, {"loss": 1.0})
    console.note("done")
    console.print_metrics({"validation": {}})
    assert stream.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_a_note_is_printed_as_it_is(shown):
    stream = shown(False)
    console.note("[bold]" + "x" * 200)
    console.note(None)
    assert stream.getvalue() == "[bold]" + "x" * 200 + "\n"
