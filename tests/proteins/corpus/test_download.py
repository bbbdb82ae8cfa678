"""Downloads continue, are checked, and say what is wrong."""

import hashlib
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from performers.app.errors import UserError
from performers.proteins.corpus.download import download
from performers.proteins.corpus.sources import open_source

CONTENT = bytes(range(256)) * 40_000
METALINK = """<?xml version="1.0" encoding="UTF-8"?>
<metalink xmlns="http://www.metalinker.org/" version="3.0"><version>2026_04</version><files>
<file name="other.gz"><size>3</size><verification><hash type="md5">aa</hash></verification></file>
<file name="proteins.fasta.gz"><size>{size}</size>
<verification><hash type="md5">{md5}</hash></verification></file></files></metalink>"""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        if self.path.endswith("RELEASE.metalink"):
            md5 = hashlib.md5(CONTENT).hexdigest()
            return self._send(200, METALINK.format(size=len(CONTENT), md5=md5).encode())
        if server.failures:
            return self._send(server.failures.pop(), b"")
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        status = 206 if start and server.ranges else 200
        body = server.content[start if status == 206 else 0 :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut] if server.cut else body)
        server.cut = None
        return None

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.requests, server.failures, server.content = [], [], CONTENT
    server.ranges, server.cut = True, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}/complete/proteins.fasta.gz"


fetch = partial(download, pause=0.01)


def test_whole_file(url, tmp_path):
    seen = []
    release = fetch(url, tmp_path / "p.gz", progress=lambda *work: seen.append(work))
    assert release == "2026_04"
    assert (tmp_path / "p.gz").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert not (tmp_path / "p.gz.part").exists()


def test_a_broken_connection_is_continued(server, url, tmp_path):
    server.cut = 3_000_000
    fetch(url, tmp_path / "p.gz")
    assert (tmp_path / "p.gz").read_bytes() == CONTENT
    ranges = [sent for path, sent in server.requests if path.endswith(".gz")]
    assert ranges[0] is None
    assert re.fullmatch(r"bytes=\d{6,}-", ranges[1])


def test_a_file_that_is_not_there_is_not(server, url, tmp_path):
    server.failures = [404] * 9
    with pytest.raises(UserError, match=r"cannot be reached .*--source"):
        fetch(url, tmp_path / "p.gz")
    assert len(server.failures) == 8


def test_wrong_checksum(server, url, tmp_path):
    server.content = b"x" + CONTENT[1:]
    with pytest.raises(UserError, match="checksum"):
        fetch(url, tmp_path / "p.gz")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_download_is_of_the_release_it_was_and_asks_nothing_more(server, url, tmp_path):
    first = open_source([], tmp_path, url=url)
    assert first.description["release"] == "2026_04"
    assert first.description["licence"].startswith("CC BY 4.0")
    asked = len(server.requests)
    assert open_source([], tmp_path, url=url) == first
    assert len(server.requests) == asked


@pytest.mark.parametrize("ranges", [True, False])
def test_what_an_earlier_run_got_is_kept(server, url, tmp_path, ranges):
    server.ranges, server.failures = ranges, [503, 500]
    (tmp_path / "p.gz.part").write_bytes(CONTENT[:5_000_000])
    fetch(url, tmp_path / "p.gz")
    assert (tmp_path / "p.gz").read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=5000000-"


def test_releases_that_cannot_be_had(url, tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1.* cannot be reached .*--source"):
        download("http://127.0.0.1:9/x/proteins.fasta.gz", tmp_path / "p.gz")
    with pytest.raises(UserError, match="does not describe missing"):
        download(url.replace("proteins.fasta.gz", "missing.gz"), tmp_path / "p.gz")
