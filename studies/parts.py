"""Studies made of parts, each measured once and kept in ``results.json``."""

from __future__ import annotations

import json
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

    Settings and parts are compared, used and returned as JSON gives them back.

    Args:
        folder: Receives ``results.json``.
        settings: Numbers that a part's result depends on.
        parts: Measurements by name.
        tables: Tables of those that are done.
        resume: Whether the folder may hold results.

    Raises:
        UserError: The folder cannot be written, is not empty (without ``resume``), or its results
            are not those of parts or have other settings; the message names them.
    """
    file = prepare_output_folder(folder, resume=resume) / "results.json"
    done: dict[str, Part] = {}
    given = _as_json(settings)
    if file.exists():
        earlier = read_json(file)
        if not isinstance(earlier, dict) or not {"settings", "parts"} <= earlier.keys():
            raise UserError(f"{file} holds no parts of a study; give another folder")
        before = earlier["settings"]
        changed = [x for x in {**before, **given} if before.get(x) != given.get(x)]
        if changed:
            listed = "; ".join(f"{x} was {before.get(x)}, now {given.get(x)}" for x in changed)
            raise UserError(
                f"{file} was measured with other settings ({listed}); give another folder"
            )
        done = earlier["parts"]
    for number, (name, measure) in enumerate(parts.items()):
        if name in done:
            note(f"{name}: {number + 1} of {len(parts)}, kept")
            continue
        done[name] = _as_json(measure())
        shown = {key: table._asdict() for key, table in tables(done).items()}
        write_json(file, {"settings": given, "parts": done, "tables": shown})
        note(f"{name}: {number + 1} of {len(parts)}")
    return done


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, and keys as text."""
    read: dict[str, Any] = json.loads(json.dumps(content))
    return read
