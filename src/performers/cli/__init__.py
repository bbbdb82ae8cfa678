"""The command line: parses, calls, prints."""

import sys

from performers.cli.interrupts import end_at_once


def main() -> None:
    """Run ``performers``; exit code 2 for what the user can mend, 130 after Ctrl-C."""
    end_at_once()
    try:
        from performers.cli.app import app
    except ImportError as error:
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        extra = command if command in ("benchmark", "convert") else "proteins"
        print(
            f"performers: the command line needs more packages ({error}); install them with "
            f"pip install 'performers[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app()
