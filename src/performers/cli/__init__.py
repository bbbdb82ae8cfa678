"""The command line: parses, calls, prints."""

import sys


def main() -> None:
    """Run ``performers``; exit code 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        from performers.cli.app import app
    except ImportError as error:
        print(
            f"performers: the command line needs more packages ({error}); install them with "
            "pip install 'performers[proteins]'",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    app()
