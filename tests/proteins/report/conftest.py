"""Reports without pictures, which take most of the time."""

import pytest

from performers.proteins.report import page


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Fixtures of a module, which are made before, have pictures."""
    monkeypatch.setattr(page.charts, "png", lambda chart: b"")
