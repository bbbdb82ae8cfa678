"""The command makes the preset that its options ask for."""

from pathlib import Path

import pytest

from studies.proteins.presets import PRESETS
from tests.cli.commands import run


@pytest.mark.parametrize(("steps", "expected"), [(10, 5), (1, 1), (600, 300), (10_000, 300)])
def test_a_shorter_study_has_checkpoints_on_its_way(tmp_path, monkeypatch, steps, expected):
    asked = []

    def run_study(output, data, preset, **options):
        asked.append(preset.training)
        return Path("report.html")

    monkeypatch.setattr("studies.proteins.study.run_study", run_study)
    run("study", "proteins", "--output", tmp_path, "--steps", steps)
    assert PRESETS["minutes"].training.save_steps == 300
    assert (asked[0].steps, asked[0].save_steps) == (steps, expected)
