"""Downloads of UniProt that continue where they stopped and are checked against a checksum."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

from performers.app.errors import UserError
from performers.app.progress import Progress

_METALINK = "RELEASE.metalink"
_CHUNK = 1 << 20
_ATTEMPTS = 5
_TIMEOUT_S = 60


def _describe(url: str) -> tuple[str, int, str]:
    """Release, size and checksum of a file, from the metalink of its folder."""
    folder, _, name = url.rpartition("/")
    try:
        with urllib.request.urlopen(f"{folder}/{_METALINK}", timeout=_TIMEOUT_S) as answer:
            root = ElementTree.fromstring(answer.read())
    except (OSError, http.client.HTTPException, ElementTree.ParseError) as error:
        raise _unreachable(f"{folder}/{_METALINK}", error) from error
    space = {"m": root.tag.partition("}")[0].lstrip("{")}
    for file in root.iterfind(".//m:file", space):
        if file.get("name") == name:
            size = file.findtext("m:size", "", space)
            md5 = file.findtext("m:verification/m:hash[@type='md5']", "", space)
            version = root.findtext("m:version", "", space)
            if size.isdigit() and md5:
                return version, int(size), md5
    raise UserError(f"{folder}/{_METALINK} does not describe {name}; check the address")


def download(url: str, path: Path, *, progress: Progress | None = None, pause: float = 1.0) -> str:
    """Download a file of a release of UniProt; what an earlier attempt got is continued.

    Until it is complete and checked the data are in ``path`` + ``.part``. The pause in seconds
    before the second attempt doubles before each further one.

    Returns:
        The name of the release.

    Raises:
        UserError: It cannot be reached in five attempts, the release does not describe it, or the
            checksum is wrong.
    """
    release, size, md5 = _describe(url)
    part = path.with_name(path.name + ".part")
    for attempt in range(_ATTEMPTS):
        try:
            _continue(url, part, size, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == _ATTEMPTS - 1:
                raise _unreachable(url, error) from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == _ATTEMPTS - 1:
                raise _unreachable(url, error) from error
        time.sleep(pause * 2**attempt)
    digest = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest() != md5:
        part.unlink()
        raise UserError(
            f"{url}: the checksum is {digest.hexdigest()}, expected {md5}; the damaged copy is "
            "removed, start again"
        )
    part.replace(path)
    return release


def _continue(url: str, part: Path, size: int, progress: Progress | None) -> None:
    there = part.stat().st_size if part.exists() else 0
    if there > size:
        part.unlink()
        there = 0
    if there == size:
        return
    request = urllib.request.Request(url)
    if there:
        request.add_header("Range", f"bytes={there}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        # A server that ignores the range sends the whole file.
        if there and getattr(answer, "status", None) != http.HTTPStatus.PARTIAL_CONTENT:
            there = 0
        with part.open("ab" if there else "wb") as file:
            while block := answer.read(_CHUNK):
                file.write(block)
                there += len(block)
                if progress is not None:
                    progress(there, size)
    if there < size:
        raise ConnectionError(f"the connection ended after {there} of {size} bytes")


def _unreachable(url: str, error: Exception) -> UserError:
    reason = getattr(error, "reason", None) or error
    return UserError(
        f"{url} cannot be reached ({reason}); check the connection and start again, it continues "
        "where it stopped, or download the file elsewhere and give it as --source"
    )
