"""The command line: parses, calls, prints."""

import sys


def main() -> None:
    """Run ``performers``; exit code 2 for what the user can mend, 130 after Ctrl-C."""
    # Its packages are fewer: it must not fail for want of those that read proteins.
    benchmark = sys.argv[1:2] == ["benchmark"]
    try:
        if benchmark:
            from performers.cli.benchmark import app
        else:
            from performers.cli.app import app
    except ImportError as error:
        extra = "benchmark" if benchmark else "proteins"
        print(
            f"performers: the command line needs more packages ({error}); install them with "
            f"pip install 'performers[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if benchmark:
        app(sys.argv[2:], prog_name="performers benchmark")
    else:
        app()
