"""The package index of a Debian."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from performers.app.errors import UserError

_FIELD = re.compile(r"^([A-Z][\w-]*): (.*)$", re.MULTILINE)
_DEPENDENCIES = ("Depends", "Pre-Depends", "Recommends")


def read_index(path: str | None) -> str:
    """The text of an index: a file, or ``apt-cache dumpavail``."""
    try:
        if path is not None:
            return Path(path).read_text(encoding="utf-8")
        command = ["apt-cache", "dumpavail"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"no package index ({error}); give one with --packages") from error
    if not text:
        raise UserError("apt-cache dumpavail is empty; give a package index with --packages")
    return text


def package_fields(index: str) -> dict[str, dict[str, str]]:
    """The fields of each package that fit into one line, by the package's name."""
    paragraphs = (dict(_FIELD.findall(paragraph)) for paragraph in index.split("\n\n"))
    return {fields["Package"]: fields for fields in paragraphs if "Package" in fields}


def named_packages(fields: dict[str, str]) -> list[str]:
    """Names in Depends, Pre-Depends and Recommends, all alternatives."""
    return [
        re.split(r"[ (:\[]", name.strip(), maxsplit=1)[0]
        for key in _DEPENDENCIES
        for name in re.split(r"[,|]", fields.get(key, ""))
    ]
