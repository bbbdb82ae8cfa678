"""Ctrl-C, at whatever moment and however often: one line and exit code 130."""

import os
import signal

import pytest

from tests.cli.commands import refusal
from tests.proteins.runs import finish, start

# A command line of one command, whose moments of interest are filled in below.
_SCRIPT = """
import atexit, importlib.abc, os, signal, sys, time, types
import performers.cli as cli

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)

class Importing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "performers.cli.app":
            {importing}

sys.meta_path.insert(0, Importing())

def make_app():
    import typer
    from performers.cli.commands import App
    from performers.app.errors import Interrupted

    def parsing(value):
        {parsing}

    class Finalized:
        def __del__(self):
            {finalized}

    app = App()

    @app.command()
    def work(option: int = typer.Option(1, callback=parsing)):
        try:
            Finalized()
            {working}
        finally:
            {unwinding}

    return app

module = types.ModuleType("performers.cli.app")

def attribute(name):
    # Libraries that look through all modules ask for others.
    if name != "app":
        raise AttributeError(name)
    return make_app()

module.__getattr__ = attribute
if {stand_in}:
    sys.modules["performers.cli.app"] = module

@atexit.register
def end():
    {ending}

sys.argv = ["performers"]
{before}
cli.main()
"""
_MOMENTS = ("importing", "parsing", "finalized", "working", "unwinding", "ending", "before")


def interrupt(**code):
    """Run the script with code at some of its moments; returns exit code and output."""
    moments = {moment: code.get(moment, "pass") for moment in _MOMENTS}
    return finish(start("-c", _SCRIPT.format(**moments, stand_in="importing" not in code)))


@pytest.mark.parametrize(
    "moments",
    [
        ("importing",),
        ("parsing",),
        ("finalized",),
        ("working",),
        ("working", "unwinding", "ending"),
        ("ending",),
    ],
    ids=" then ".join,
)
def test_an_interrupt_is_one_line(moments):
    code, out, err = interrupt(**dict.fromkeys(moments, "ctrl_c()"))
    assert (code, out, err) == (130, "", "performers: interrupted\n")


def test_what_a_command_says_of_its_end_is_not_followed_by_more():
    working = "raise Interrupted('stopped; --resume goes on')"
    found = interrupt(working=working, ending="ctrl_c()")
    assert found == (130, "", "performers: stopped; --resume goes on\n")


def test_a_command_in_the_background_ignores_it():
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    moments = dict.fromkeys(_MOMENTS[1:-1], "ctrl_c()")
    assert interrupt(before=ignore, **moments) == (0, "", "")


def test_other_errors_in_finalizers_are_reported():
    code, _, err = interrupt(finalized="raise ValueError('odd')")
    assert code == 0
    assert "ValueError: odd" in err


def test_inside_another_program_the_handler_stays_its_own():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        line = refusal("evaluate", os.devnull + "/none")
        assert "no such file" in line
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
