"""The command line: parses, calls, prints."""

import importlib
import sys

from performers.cli.interrupts import end_at_once

# Commands whose packages are fewer than those that read proteins, which they must not fail for
# want of; each is its own extra.
_ALONE = ("benchmark", "convert")


def main() -> None:
    """Run ``performers``; exit code 2 for what the user can mend, 130 after Ctrl-C."""
    end_at_once()
    alone = sys.argv[1] if sys.argv[1:2] and sys.argv[1] in _ALONE else None
    try:
        app = importlib.import_module(f"performers.cli.{alone or 'app'}").app
    except ImportError as error:
        print(
            f"performers: the command line needs more packages ({error}); install them with "
            f"pip install 'performers[{alone or 'proteins'}]'",
            file=sys.stderr,
        )
        sys.exit(2)
    if alone:
        app(sys.argv[2:], prog_name=f"performers {alone}")
    else:
        app()
