"""The command makes the preset that its options ask for."""

from pathlib import Path

import pytest

from studies.proteins import __main__ as command
from studies.proteins.presets import PRESETS
from tests.cli.commands import refusal, run


@pytest.mark.parametrize(("steps", "expected"), [(10, 5), (1, 1), (600, 300), (10_000, 300)])
def test_a_shorter_study_has_checkpoints_on_its_way(tmp_path, monkeypatch, steps, expected):
    asked = []

    def run_study(output, data, preset, **options):
        asked.append(preset.training)
        return Path("report.md")

    monkeypatch.setattr("studies.proteins.runs.run_study", run_study)
    run("--output", tmp_path, "--steps", steps, app=command.app)
    assert PRESETS["minutes"].training.save_steps == 300
    assert (asked[0].steps, asked[0].save_steps) == (steps, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", 10**12], "--threads must be at least 1 and at most 1024"),
        (["--preset", "days"], "--preset must be one of minutes, hours, cluster"),
        (["--preset", "hours"], "--preset hours needs --data"),
        (["--attention", "flash"], "--attention must be of exact, favor-relu"),
    ],
)
def test_bad_options_name_their_flag(arguments, words, tmp_path):
    assert words in refusal(*arguments, "--output", tmp_path / "out", app=command.app)
    assert not (tmp_path / "out").exists()


def test_presets_are_those_of_the_command():
    assert tuple(PRESETS) == command.PRESETS
