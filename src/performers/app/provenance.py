"""Origin of results: the command that made them, when, with which versions, seed and model."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from performers.app.files import write_json

KEY = "provenance"
"""Key of JSON results that two runs of one command do not share."""

_PACKAGES = ("performers", "torch", "transformers", "numpy")


def provenance(
    schema: str, *, seed: int | None = None, model: Path | None = None
) -> dict[str, Any]:
    """Describe the origin of results.

    Args:
        schema: Name of their layout, such as ``"evaluation"``; numbered 1 until it changes.
        seed: Seed that they depend on.
        model: Folder of the model that they are of.

    Returns:
        ``schema``, ``date`` (UTC), ``command``, ``versions``, and ``seed`` and ``model`` (its
        path, and the SHA-256 of its weights) where there are any.
    """
    found: dict[str, Any] = {
        "schema": f"performers/{schema}/1",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0], **_versions()},
    }
    if seed is not None:
        found["seed"] = seed
    if model is not None:
        found["model"] = {"path": str(model), "sha256": _weights(model)}
    return found


def write_result(
    path: Path,
    content: Mapping[str, Any],
    schema: str,
    *,
    seed: int | None = None,
    model: Path | None = None,
) -> None:
    """Write JSON with its `provenance` under a key of that name, whole or not at all."""
    write_json(path, {KEY: provenance(schema, seed=seed, model=model), **content})


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _weights(folder: Path) -> str | None:
    path = folder / "model.safetensors"
    if not path.is_file():
        return None
    status = path.stat()
    return _hash(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _hash(path: Path, *changes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
