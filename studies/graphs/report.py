from __future__ import annotations

from collections.abc import Mapping

from studies.pages import Table
from studies.parts import Part


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    return {}
