"""``python -m performers``, for launchers such as torchrun."""

from performers.cli import main

main()
