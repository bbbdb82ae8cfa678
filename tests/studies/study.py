"""Runs studies on made-up data."""

import json

from studies.pages import Table
from tests.cli import commands


def run(app, output, *arguments):
    """Run a study; returns ``results.json``, whose tables can be written, and lines of progress."""
    _, lines = commands.run(*arguments, "--output", output, app=app)
    content = json.loads((output / "results.json").read_text())
    assert all(Table(**table).markdown() for table in content["tables"].values())
    return content, lines
