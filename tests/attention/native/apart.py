"""Code in processes of its own, forked from one that has imported torch and no more."""

import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLES = ("PERFORMERS_NATIVE_LIBRARY", "PERFORMERS_NATIVE_ISA")


def execute(code: str, output: Path, *path: Path, **variables: str) -> SimpleNamespace:
    """Run code where warnings are errors.

    Args:
        code: Python code.
        output: Folder for what it writes.
        path: First of the folders that it imports from.
        variables: All variables of the environment that are named in ``VARIABLES``.

    Returns:
        ``returncode``, ``stdout`` and ``stderr``, as of a process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    files = [output / name for name in ("stdout", "stderr")]
    process = context.Process(target=_run, args=(code, files, path, variables))
    process.start()
    process.join(300)
    return SimpleNamespace(
        returncode=process.exitcode,
        **{file.name: file.read_text() for file in files},
    )


def _run(code: str, files: list[Path], path: tuple[Path, ...], variables: dict[str, str]) -> None:
    assert not any(name.split(".")[0] == "performers" for name in sys.modules)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    # An editable install of the package outranks the path, so it goes first.
    sys.meta_path[:] = [x for x in sys.meta_path if "Redirect" not in type(x).__name__]
    sys.path[:0] = map(str, path)
    warnings.resetwarnings()
    warnings.simplefilter("error")
    space: dict[str, Any] = {"__name__": "__main__"}
    status = 0
    try:
        exec(compile(code, "code", "exec"), space)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
