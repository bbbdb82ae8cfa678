"""The protein language model that ships with the library."""

from pathlib import Path

PRETRAINED = "performers-protein-small"
"""Its name, which the command line takes in the place of a folder."""

_FOLDER = Path(__file__).resolve().parent / "data" / PRETRAINED


def pretrained_folder() -> Path:
    """The folder of ``performers-protein-small``, for ``load_model``; its README is the model card.

    Returns:
        A folder inside the installed package.

    Raises:
        FileNotFoundError: The installation lacks it.
    """
    if not (_FOLDER / "config.json").is_file():
        raise FileNotFoundError(f"{_FOLDER} is missing; reinstall performers")
    return _FOLDER
