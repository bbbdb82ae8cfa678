"""``python -m studies.sequence_parallel``: its measurements in order, its tables, a refusal."""

from studies.sequence_parallel.__main__ import SequenceParallelOptions, app
from studies.sequence_parallel.runs import measures, tables
from tests.cli import commands


def test_one_process_is_measured_first(tmp_path):
    names = list(measures(SequenceParallelOptions(output_folder=tmp_path, processes=(1, 2))))
    assert names == ["loop, 1", "loop, 2", "trainer, 1", "trainer, 2"]


def test_tables():
    alone, errors = {"message_bytes": 0}, {"loss_error": 7e-8, "parameter_error": 8.9e-6}
    short, long = ({"message_bytes": 71_952, "mebibytes": x, **errors} for x in (40.0, 440.2))
    parts = {
        "loop, 1": {
            "processes": 1,
            "short": {**alone, "mebibytes": 60.0},
            "long": {**alone, "mebibytes": 860.2},
        },
        "loop, 2": {"processes": 2, "short": short, "long": long},
        "trainer, 1": {"processes": 1, "short": [230.0], "long": [1030.0]},
        "trainer, 2": {"processes": 2, "short": [240.0, 250.0], "long": [650.0, 640.0]},
    }
    found = tables(parts)
    assert found["loop"].rows == [
        ["1", "60 MiB", "860 MiB", "800 MiB", "1.00", "–", "–", "–"],
        ["2", "40 MiB", "440 MiB", "400 MiB", "0.50", "7.0e-08", "8.9e-06", "71,952 B"],
    ]
    # Of the process that takes most.
    assert found["trainer"].rows == [
        ["1", "230 MiB", "1030 MiB", "800 MiB", "1.00"],
        ["2", "250 MiB", "650 MiB", "400 MiB", "0.50"],
    ]


def test_one_process_is_what_others_are_compared_with(tmp_path):
    line = commands.refusal("--output", tmp_path / "out", "--processes", "2,4", app=app)
    assert "--processes must begin with 1, got [2, 4]" in line
