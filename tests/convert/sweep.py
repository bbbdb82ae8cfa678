"""Conversion of every model class of transformers that can be built small.

``python -m tests.convert.sweep --output FILE`` writes a page of all classes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import logging
import multiprocessing
import re
import resource
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.convert.examination import (
    CRASH,
    EQUAL,
    SECONDS,
    UNBUILT,
    Row,
    describe,
    examine,
    one_line,
)
from tests.convert.small_models import model_classes

# Heads that only read the last hidden state share the attention of their base.
_HEADS = "CAUSAL_LM|SEQ_TO_SEQ_CAUSAL_LM|SPEECH_SEQ_2_SEQ|MULTIMODAL_LM"
MAPPINGS = rf"^MODEL(_FOR_({_HEADS}))?_MAPPING_NAMES$"
BYTES = 10 * 2**30


class Examiner:
    """A process that examines classes one by one, started again when one of them kills it."""

    # Limit for one class.
    seconds = SECONDS
    _pool: Any = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown()
        self._pool = None

    def examine(self, name: str, model_type: str) -> Row:
        """The outcome for a class, see `examine`; one that takes too long is not buildable."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, initializer=_prepare)
        try:
            return self._pool.submit(_examine_quietly, name, model_type).result(self.seconds)
        except TimeoutError:
            row = Row(name, UNBUILT, f"takes more than {self.seconds:.0f} s", seconds=self.seconds)
        except BrokenProcessPool as error:
            row = Row(name, CRASH, one_line(str(error)))
        self.__exit__()
        return row


def _prepare() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _examine_quietly(name: str, model_type: str) -> Row:
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:
            return examine(name, model_type)
        except Exception as error:
            return Row(name, UNBUILT, f"examination: {describe(error)}")


PAGE = """\
# Classes of transformers

Every model class of the auto mappings in transformers {version} that can be built small: \
converted with a window that covers the input, its outputs equal the original's (1e-4; also with \
padding, and five generated tokens), or `to_performer` refuses it. Written by

```
python -m tests.convert.sweep --output docs/results/classes.md
```

{counts}.

| outcome | classes |
| --- | --- |
"""


def counts(rows: Iterable[Row]) -> str:
    """The number of classes of each status."""
    found = collections.Counter(row.status for row in rows)
    return ", ".join(f"{count} {status}" for status, count in found.most_common())


def page(rows: list[Row]) -> str:
    """Rows as a page in Markdown: a count, and the classes of each status and reason."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        # Names of classes, modules and sizes are not the reason.
        reason = re.sub(r"^[\w.]+ \(\w+\) |\b[A-Z]\w+ (?=[a-z])|\([^()]*\)|\d+", "", row.detail)
        reason = "" if row.status in (EQUAL, UNBUILT) else reason.split(":")[0].strip()
        groups[f"{row.status}: {reason}" if reason else row.status].append(row.name)
    lines = [
        f"| {group.replace('|', '/')} ({len(names)}) | {', '.join(sorted(names))} |\n"
        for group, names in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return PAGE.format(version=transformers.__version__, counts=counts(rows)) + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="The page (Markdown).")
    parser.add_argument("--classes", default="", help="Pattern for names of classes.")
    options = parser.parse_args()
    rows = []
    with Examiner() as examiner:
        for name, model_type in model_classes(MAPPINGS).items():
            if re.search(options.classes, name):
                rows.append(examiner.examine(name, model_type))
                print(rows[-1], flush=True)
    options.output.write_text(page(rows))
    print(counts(rows))


if __name__ == "__main__":
    main()
