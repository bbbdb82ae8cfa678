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

from performers.app.files import sha256, write_json

KEY = "provenance"
"""Entry of JSON results that differs between two runs of one command."""

# Files of weights, the first of these patterns that any file matches.
_WEIGHTS = ("model.safetensors", "*.safetensors", "pytorch_model*.bin", "*.gguf")
_PACKAGES = ("performers", "torch", "transformers", "numpy")


def provenance(
    schema: str, *, seed: int | None = None, model: Path | None = None
) -> dict[str, Any]:
    """Origin of results.

    Args:
        schema: Name of their layout, such as ``"evaluation"``; numbered 1 until it changes.
        seed: Seed that they depend on.
        model: Folder, or file of weights, of the model that they are of.

    Returns:
        ``schema``, ``date`` (UTC), ``command``, ``versions``, and ``seed`` and ``model`` (its
        path, and the SHA-256 of its weights) where there are any.
    """
    found: dict[str, Any] = {
        "schema": f"performers/{schema}/1",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) or "not installed" for name in _PACKAGES},
        },
    }
    if seed is not None:
        found["seed"] = seed
    if model is not None:
        found["model"] = {"path": str(model), "sha256": weights_sha256(model)}
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


def weights_sha256(model: Path) -> str | None:
    """SHA-256 of the weights of a model, a folder or a file.

    That of the file, or of the list of hashes where there are several; None without files.
    """
    files = [model] if model.is_file() else []
    for pattern in _WEIGHTS:
        files = files or sorted(model.glob(pattern))
    hashes = []
    for path in files:
        status = path.stat()
        hashes.append(_hash(path, status.st_mtime_ns, status.st_size))
    if len(hashes) > 1:
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    return hashes[0] if hashes else None


def version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=256)
def _hash(path: Path, *changes: int) -> str:
    return sha256(path)
