"""Write the novels of Debian's r-cran-janeaustenr as plain text, without R.

Needs ``pip install rdata``.

Usage:
    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb unpacked
    python tools/janeausten.py unpacked/usr/lib/R/site-library/janeaustenr/data austen
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import rdata


def read_novels(folder: Path) -> dict[str, str]:
    """Texts by their names in a lazy-load database of R: an index, and values compressed apart.

    Args:
        folder: Folder of ``Rdata.rdx`` and ``Rdata.rdb``.

    Returns:
        Each text with the lines that R has as a vector.

    Raises:
        ValueError: A value is not compressed with zlib, as R does by default.
    """
    index = _read((folder / "Rdata.rdx").read_bytes(), 16 + zlib.MAX_WBITS)
    values = (folder / "Rdata.rdb").read_bytes()
    novels = {}
    for name, (start, size) in index["variables"].items():
        # Four bytes are the length after decompression.
        try:
            lines = _read(values[start + 4 : start + size], zlib.MAX_WBITS)
        except zlib.error as error:
            raise ValueError(f"{name} in {folder} is not compressed with zlib") from error
        novels[str(name)] = "\n".join(map(str, lines)) + "\n"
    return novels


def _read(data: bytes, wbits: int) -> Any:
    return rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(data, wbits)))


def main() -> None:
    """Write a file for each novel."""
    source, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    for name, text in read_novels(source).items():
        (output / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text.encode()):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
