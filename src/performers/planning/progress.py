"""A line on the terminal while something takes long."""

import sys
import time

_PATIENCE_SECONDS = 1.5
_INTERVAL_SECONDS = 0.2


class Progress:
    """Says on stderr how far things are, if that is a terminal and they take a while."""

    def __init__(self, show: bool) -> None:
        self._stream = sys.stderr if show and sys.stderr and sys.stderr.isatty() else None
        self._begun = self._said = time.monotonic()
        self._name, self._done, self._total = "", 0, 0
        self._width = 0

    def start(self, name: str, total: int) -> None:
        """A new stretch of work."""
        self._name, self._done, self._total = name, 0, total

    def step(self) -> None:
        """One piece is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._begun > _PATIENCE_SECONDS and now - self._said > _INTERVAL_SECONDS:
            self._said = now
            self._write(f"plan: {self._name} {self._done}/{self._total}")

    def finish(self) -> None:
        """Take the line away."""
        if self._width:
            self._write(f"{'':{self._width}}\r")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(f"\r{text:{self._width}}")
            self._stream.flush()
            self._width = len(text)
