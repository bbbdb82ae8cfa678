"""Studies made of parts, each measured once and kept in ``results.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import prepare_output_folder, read_json, sha256, write_json
from performers.app.options import Options, option
from performers.cli.console import note
from studies.pages import Table

Part = dict[str, Any]
Measures = dict[str, Callable[[], Part]]
Tables = Callable[[Mapping[str, Part]], dict[str, Table]]

extent = partial(option, changes_result=False)
"""An option that says what is measured and on which data, and not how."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """Options of every study of parts."""

    output_folder: Path = option("Folder of results.json.", flag="--output", changes_result=False)
    resume: bool = extent("Skip the parts that results.json has.", False)

    def settings(self) -> dict[str, Any]:
        """The options that a part's result depends on."""
        return {name: getattr(self, name) for name in self.decisive()}


def run_parts(
    options: StudyOptions,
    parts: Mapping[str, Callable[[], Part]],
    tables: Tables,
    *,
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
) -> dict[str, Part]:
    """Run the parts that ``results.json`` lacks; it is written after each, with its tables.

    Settings and parts are compared, used and returned as JSON gives them back.

    Args:
        options: Folder of ``results.json``, and whether it may hold results.
        parts: Measurements by name.
        tables: Tables of those that are done.
        settings: What a part's result depends on, if not the options alone.
        data: Fingerprints of the data by the section (the name up to the first comma) of the parts
            that are measured on them; compared where the section has parts already.

    Raises:
        UserError: The folder cannot be written, is not empty (without ``--resume``), or its results
            are not those of parts or have other settings or data; the message names them.
    """
    file = prepare_output_folder(options.output_folder, resume=options.resume) / "results.json"
    given = as_json(options.settings() if settings is None else settings)
    done: dict[str, Part] = {}
    known = dict(data or {})
    if file.exists():
        earlier = read_json(file)
        if not isinstance(earlier, dict) or not {"settings", "parts"} <= earlier.keys():
            raise UserError(f"{file} holds no parts of a study; give another folder")
        done, kept = earlier["parts"], earlier.get("data", {})
        shared = known.keys() & {name.split(", ")[0] for name in done}
        before = earlier["settings"] | {f"data of {x}": kept.get(x) for x in sorted(shared)}
        now = given | {f"data of {x}": known[x] for x in sorted(shared)}
        changed = [x for x in {**before, **now} if before.get(x) != now.get(x)]
        if changed:
            listed = "; ".join(f"{x} was {before.get(x)}, now {now.get(x)}" for x in changed)
            raise UserError(
                f"{file} was measured with other settings ({listed}); give another folder"
            )
        known = kept | known
    for number, (name, measure) in enumerate(parts.items(), start=1):
        place = f"{name}: {number} of {len(parts)}"
        if name in done:
            note(f"{place}, kept")
            continue
        done[name] = as_json(measure())
        shown = {key: table._asdict() for key, table in tables(done).items()}
        content = {"settings": given, "parts": done, "tables": shown}
        write_json(file, {**content, "data": known} if known else content)
        note(place)
    return done


def fingerprint(*paths: str | Path) -> str:
    """SHA-256 of files, and of all files in folders with their names; what is missing is empty."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in filter(Path.is_file, sorted((path, *path.rglob("*")))):
            digest.update(f"{file.relative_to(path)}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def section(parts: Mapping[str, Part], name: str) -> dict[str, Part]:
    """The parts whose names begin with a section's, by the rest of their names."""
    start = f"{name}, "
    return {key.removeprefix(start): part for key, part in parts.items() if key.startswith(start)}


def by_seed(parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """The parts of all seeds, by the name before the seed."""
    found: dict[str, list[Part]] = {}
    for name, part in parts.items():
        found.setdefault(name.rpartition(", seed ")[0], []).append(part)
    return found


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON gives it back: tuples as lists, and keys as text."""
    read: dict[str, Any] = json.loads(json.dumps(content))
    return read
