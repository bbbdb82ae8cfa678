"""Manifests of saved folders: sizes and SHA-256 hashes that reveal changed files."""

import os
import shutil
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import read_json, sha256, write_json

MANIFEST = "manifest.json"
"""Name of the manifest in its folder."""

_SCHEMA = 1
_ENTRY = {"size": int, "sha256": str}


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder, atomically.

    It lists the regular files of the folder and its subfolders except hidden ones and itself.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and relative != Path(MANIFEST) and path.is_file():
            files[relative.as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"schema": _SCHEMA, "files": files})


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
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
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
        if size != entry["size"]:
            return f"{name} has {size:,} bytes, expected {entry['size']:,}"
    for name, entry in files.items():
        try:
            digest = sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if digest != entry["sha256"]:
            return f"{name} does not match its SHA-256 in {MANIFEST}"
    return None


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Read the size and SHA-256 of each file in a folder's manifest; None without a manifest.

    Raises:
        ValueError: The manifest is not a regular file, not JSON, or of another schema.
    """
    if not os.path.lexists(folder / MANIFEST):
        return None
    try:
        content = read_json(folder / MANIFEST)
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{folder}{os.sep}")) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != _SCHEMA:
        raise ValueError(f"{MANIFEST} has schema {schema!r}, expected {_SCHEMA}")
    files: Any = content.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {key: type(x) for key, x in entry.items()} == _ENTRY
        for entry in files.values()
    ):
        raise ValueError(f"{MANIFEST} does not give the size and SHA-256 of each file")
    return files
