"""Runs commands inside the test's process."""

from typer.testing import CliRunner

from performers.cli.app import app as performers


def run(*arguments, code=0, app=performers):
    """Run a command; returns its standard output and the lines of its standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr.splitlines()


def refusal(*arguments, code=2, app=performers):
    """Run a command that must fail with one line and nothing else; returns the line."""
    out, lines = run(*arguments, code=code, app=app)
    assert out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("performers: ")
    return lines[0].removeprefix("performers: ")
