"""Manifests of saved folders: sizes and SHA-256 hashes that reveal changed files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from performers.app.files import sha256

MANIFEST = "manifest.json"
"""Name of the manifest in its folder."""

_SCHEMA = 1


class FileEntry(NamedTuple):
    """Content of one file, as a manifest records it."""

    size: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder, atomically.

    It lists the regular files of the folder and its subfolders except hidden ones and itself.
    """
    files = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if name.startswith(".") or relative == MANIFEST or not path.is_file():
                continue
            files[relative] = {"size": path.stat().st_size, "sha256": sha256(path)}
    text = json.dumps({"schema": _SCHEMA, "files": files}, indent=1) + "\n"
    temporary = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text, encoding="ascii")
        temporary.replace(folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def save_model_folder(
    folder: Path, model: Any, *parts: Any, state_dict: dict[str, Any] | None = None
) -> None:
    """Save a model and its tokenizer into a folder, with their manifest; ``config.json`` last.

    Until ``config.json`` is there the folder is not a model folder, so that an interrupted save
    leaves nothing that loads. Other files in the folder stay, and are not in the manifest.
    """
    staging = folder / f".saving-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging, state_dict=state_dict)
        for part in parts:
            part.save_pretrained(staging)
        write_manifest(staging)
        files = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        for path in files:
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_manifest(folder: Path) -> None:
    """Check the files of a folder against its manifest.

    Files that the manifest does not list are ignored, and a folder without a manifest passes.

    Raises:
        ValueError: A listed file is missing or changed, or the manifest itself is damaged.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise ValueError(
            f"{folder}: {damage}; restore it from a copy, or delete {MANIFEST} there if the change "
            "is intended"
        )


def find_damage(folder: Path) -> str | None:
    """Describe the first difference between a folder and its manifest; None if there is none."""
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if files is None:
        return None
    # Sizes first: they cost nothing, and the weights may be large.
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is not a regular file" if path.exists() else f"{name} is missing"
        size = path.stat().st_size
        if size != entry.size:
            return f"{name} has {size:,} bytes, expected {entry.size:,}"
    for name, entry in files.items():
        try:
            digest = sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if digest != entry.sha256:
            return f"{name} does not match its SHA-256 in {MANIFEST}"
    return None


def read_manifest(folder: Path) -> dict[str, FileEntry] | None:
    """Read the entries of a folder's manifest, by file name; None without a manifest.

    Raises:
        ValueError: The manifest is not a regular file, not JSON, or of another schema.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    # Opening a FIFO would wait for a writer.
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is not a regular file")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read as JSON: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != _SCHEMA:
        raise ValueError(f"{MANIFEST} has schema {schema!r}, expected {_SCHEMA}")
    files = content.get("files")
    kinds = {"size": int, "sha256": str}
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict)
        and entry.keys() == kinds.keys()
        and all(isinstance(entry[name], kind) for name, kind in kinds.items())
        for entry in files.values()
    ):
        raise ValueError(f"{MANIFEST} does not give the size and SHA-256 of each file")
    return {name: FileEntry(**entry) for name, entry in files.items()}
