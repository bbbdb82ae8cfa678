"""transformers keeps quiet: no progress bars, no advice."""

import pytest

from performers.training.environment import quiet_transformers


@pytest.fixture(autouse=True)
def quiet():
    with quiet_transformers():
        yield
