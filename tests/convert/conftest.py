"""transformers keeps quiet: no progress bars, no advice."""

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def quiet_transformers():
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
