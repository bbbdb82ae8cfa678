"""Studies made of parts, each measured once and kept in ``results.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import prepare_output_folder, read_json, write_json
from performers.cli.console import note
from studies.pages import Table

Part = dict[str, Any]
Tables = Callable[[Mapping[str, Part]], dict[str, Table]]


def run_parts(
    folder: Path,
    settings: Mapping[str, Any],
    parts: Mapping[str, Callable[[], Part]],
    tables: Tables,
    *,
    resume: bool,
) -> dict[str, Part]:
    """Run the parts that ``results.json`` lacks; it is written after each, with its tables.

    Args:
        folder: Receives ``results.json``.
        settings: Numbers that a part's result depends on.
        parts: Measurements by name.
        tables: Tables of those that are done.
        resume: Whether the folder may hold results.

    Raises:
        UserError: The folder cannot be written, is not empty (without ``resume``), or its results
            have other settings.
    """
    file = prepare_output_folder(folder, resume=resume) / "results.json"
    done: dict[str, Part] = {}
    if file.exists():
        earlier = read_json(file)
        if earlier["settings"] != settings:
            raise UserError(
                f"{file} was measured with {earlier['settings']}, this is {dict(settings)}; give "
                "another folder"
            )
        done = earlier["parts"]
    for number, (name, measure) in enumerate(parts.items()):
        if name in done:
            note(f"{name}: {number + 1} of {len(parts)}, kept")
            continue
        done[name] = measure()
        shown = {key: table._asdict() for key, table in tables(done).items()}
        write_json(file, {"settings": settings, "parts": done, "tables": shown})
        note(f"{name}: {number + 1} of {len(parts)}")
    return done
