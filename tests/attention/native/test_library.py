"""With and without the compiled library: what is said, what still works, what is an error."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import performers
from performers.attention.native import library
from performers.attention.native.interface import Call, ListedCall

NAME = {"darwin": "libperformers_native.dylib", "win32": "libperformers_native.dll"}.get(
    sys.platform, "libperformers_native.so"
)
VARIABLES = ("PERFORMERS_NATIVE_LIBRARY", "PERFORMERS_NATIVE_ISA")
IS_BUILT = library.unavailable_reason() is None
BUILT = pytest.mark.skipif(not IS_BUILT, reason="the library is not in this installation")
ISAS = library.available_isas() if IS_BUILT else ()
ATTEND = """
features = performers.SoftmaxFeatures(16, 32, generator=torch.Generator().manual_seed(0))
q, k, v = torch.randn(3, 1, 2, 40, 16, generator=torch.Generator().manual_seed(1))
def attend(backend=None):
    return performers.favor_attention(q, k, v, features, backend=backend)
"""


# Forks a process for each program, since all import torch.
SERVER = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, environment, out, err = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    failed = 0
    try:
        exec(code, {})
    except BaseException:
        traceback.print_exc()
        failed = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed)
"""


class Server:
    """Runs programs in processes that have imported torch and nothing of the package."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code, environment):
        self.count += 1
        files = [self.folder / f"{self.count}.{name}" for name in ("out", "err")]
        print(
            json.dumps([code, environment, *map(str, files)]), file=self.process.stdin, flush=True
        )
        returncode = int(self.process.stdout.readline())
        out, err = (file.read_text() for file in files)
        return subprocess.CompletedProcess([], returncode, out, err)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("programs"))
    yield made
    made.process.communicate(timeout=60)


class Installation:
    """A copy of the installed package, with another library or none."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.native = folder / "performers" / "attention" / "native"
        shutil.copytree(
            Path(performers.__file__).parent,
            folder / "performers",
            ignore=shutil.ignore_patterns("libperformers_native*", "__pycache__", "data"),
        )

    def run(self, code, **variables):
        environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        # An editable install of the package outranks the path, so it goes first.
        prologue = (
            "import sys\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if 'Redirect' not in type(f).__name__]\n"
            "import torch, performers\n"
            f"assert performers.__file__.startswith({str(self.folder)!r}), performers.__file__\n"
        )
        return self.server.run(
            prologue + code, environment | {"PYTHONPATH": str(self.folder), **variables}
        )


@pytest.fixture
def installation(tmp_path, server):
    return Installation(tmp_path, server)


def test_without_the_library_everything_else_works_and_one_line_says_why(installation):
    """Imports say nothing, and of several threads that call one does."""
    result = installation.run(
        ATTEND + "print('imported', file=sys.stderr, flush=True)\n"
        "import threading; barrier = threading.Barrier(8)\n"
        "def call(): barrier.wait(); attend()\n"
        "threads = [threading.Thread(target=call) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert performers.backends() == ('torch', 'reference')\n"
        "assert torch.equal(attend(), attend('torch'))\n"
        "attend('native')"
    )
    said, refused = result.stderr.split("Traceback")
    imported, line = said.splitlines()
    assert imported == "imported"
    assert "native backend is not available" in line
    assert "no C++20 compiler" in line
    assert "pip install" in line
    assert "ValueError: backend must be one of ('torch', 'reference')" in refused


def test_the_line_goes_through_the_logger(installation):
    result = installation.run(
        "import logging; logging.getLogger('performers').setLevel(logging.ERROR)\n"
        "performers.backends()"
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.exhaustive
def test_the_first_call_may_be_compiled(installation):
    """Looking for the library is nothing that a trace would have to follow."""
    result = installation.run(
        "import warnings; warnings.resetwarnings()\n" + ATTEND + "expected = attend('torch')\n"
        "out = torch.compile(attend, fullgraph=True, backend='eager')()\n"
        "torch.testing.assert_close(out, expected)"
    )
    assert result.returncode == 0, result.stderr


@BUILT
@pytest.mark.parametrize(
    ("path", "version", "message"),
    [
        ("nowhere", 0, "is not a file"),
        (__file__, 0, "does not load"),
        (torch._C.__file__, 0, "is not the library of performers"),
        (
            library._library and library._library._name,
            1,
            "has version . of the interface, expected",
        ),
    ],
    ids=["missing", "no library", "another library", "another version"],
)
@pytest.mark.parametrize("is_named", [True, False])
def test_a_library_that_cannot_be_used(monkeypatch, path, version, message, is_named):
    """An error if a variable names it, and else a reason to do without."""
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + version)
    if is_named:
        monkeypatch.setenv("PERFORMERS_NATIVE_LIBRARY", path)
    elif message == "is not a file":
        monkeypatch.setattr(library, "_NAME", path)
        message = "not in this installation"
    else:
        monkeypatch.setattr(library, "_locate", lambda: (Path(path), False))
    with pytest.raises(library._Unusable, match=message) as raised:
        library._open()
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_reason", str(raised.value))
    monkeypatch.setattr(library, "_demanded", raised.value.demanded)
    monkeypatch.setattr(library, "_told", False)
    assert raised.value.demanded == is_named
    if is_named:
        with pytest.raises(RuntimeError, match=message):
            library.available()
    else:
        assert not library.available()
    with pytest.raises(RuntimeError, match=message):
        library.load()


@BUILT
def test_an_instruction_set_that_the_library_has_not(monkeypatch):
    """The library says so when it is asked; a variable makes it an error."""
    fake = SimpleNamespace(
        performers_abi_version=lambda: library.ABI_VERSION,
        performers_isa=lambda: None,
        performers_available_isas=lambda: b"",
        performers_error=lambda: b"no such set",
    )
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: fake)
    with pytest.raises(library._Unusable, match="no such set") as raised:
        library._open()
    assert not raised.value.demanded


@BUILT
def test_the_library_is_used_where_it_is(installation):
    path = installation.native / NAME
    shutil.copy(library.load()._name, path)
    result = installation.run(
        "from performers.attention.native import library\n"
        "print(performers.backends()[0], library.load()._name)"
    )
    assert result.stdout.split() == ["native", str(path)], result.stderr
    assert result.stderr == ""


@BUILT
@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_can_be_chosen(isa, server):
    code = "from performers.attention.native import library; print(library.isa())"
    result = server.run(code, os.environ | {"PERFORMERS_NATIVE_ISA": isa})
    assert result.stdout == f"{isa}\n", result.stderr


@BUILT
def test_an_unknown_instruction_set_is_an_error(server):
    result = server.run(
        "import performers; print('imported', flush=True); performers.backends()",
        os.environ | {"PERFORMERS_NATIVE_ISA": "avx1024"},
    )
    assert result.returncode == 1
    assert result.stdout == "imported\n"
    last = result.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: PERFORMERS_NATIVE_ISA")
    assert "avx1024" in last
    assert all(isa in last for isa in ISAS)


@BUILT
def test_the_best_instruction_set_comes_first(server):
    environment = {k: v for k, v in os.environ.items() if k != "PERFORMERS_NATIVE_ISA"}
    code = (
        "from performers.attention.native import library\n"
        "print(library.isa(), library.available_isas()[0], library.available_isas()[-1])"
    )
    chosen, best, last = server.run(code, environment).stdout.split()
    assert chosen == best
    assert last == "portable"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [(1, MemoryError, "a shorter sequence or a smaller batch"), (3, RuntimeError, "with code 3")],
)
def test_codes_of_failures_are_errors(monkeypatch, code, error, message):
    failing = SimpleNamespace(performers_forward=lambda call: code)
    monkeypatch.setattr(library, "load", lambda: failing)
    with pytest.raises(error, match=message):
        Call().run("forward")


@BUILT
@pytest.mark.parametrize(("name", "call"), [("call", Call), ("listed_call", ListedCall)])
def test_both_sides_agree_on_the_size_of_a_call(name, call):
    """The structures that Python fills are those that the library reads."""
    size = getattr(library.load(), f"performers_{name}_size")
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(call)
