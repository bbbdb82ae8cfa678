"""Output folders and files: checked before work starts, written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.processes import is_first_process


def prepare_output_folder(folder: Path, *, resume: bool | None = None) -> Path:
    """Make a folder that results can be written to, and return it.

    Of several processes of one run only the first checks: it may begin to write before the others
    do. With ``resume`` a folder may hold the results of an earlier run; None is for a command that
    cannot resume.

    Raises:
        UserError: The folder is a file, not empty (without ``resume``), or not writable.
    """
    if not is_first_process():
        return folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    try:
        if folder.exists() and any(folder.iterdir()) and not resume:
            advice = "" if resume is None else ", or --resume to continue the run in it"
            raise UserError(f"--output {folder} is not empty; give another folder{advice}")
        _try_writing(folder / f".write-test-{os.getpid()}")
    except OSError as error:
        raise UserError(
            f"--output {folder} cannot be written ({error.strerror}); give another folder"
        ) from error
    return folder


def prepare_output_file(path: Path, suffixes: tuple[str, ...], *, flag: str = "--output") -> Path:
    """Check that a result file can be written, before the work that fills it, and return it.

    Raises:
        UserError: The suffix is none of `suffixes`, or the file cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path} must end with {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give a file")
    try:
        # The temporary file that the results are written to has a longer name.
        _try_writing(path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError)
        reason = f"{path.parent} is not a folder" if in_the_way else error.strerror
        raise UserError(
            f"{flag} {path} cannot be written ({reason}); give another place"
        ) from error
    return path


def _try_writing(probe: Path) -> None:
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    probe.unlink()


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Context of a temporary file beside another, whose place it takes if nothing is raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it, making missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: The file is missing, not a regular file or not JSON.
    """
    # Opening a FIFO would wait for a writer.
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a table that is not blank.

    Raises:
        UserError: The file does not exist, or is not text in UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as tab-separated text") from None
