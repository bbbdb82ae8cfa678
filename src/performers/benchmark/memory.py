"""Peak memory of a call, in a process of its own.

In one process the peak of an earlier call hides that of a later one, and freed memory is used again
unseen. Linux can reset the peak: writing 5 to ``/proc/self/clear_refs`` sets ``VmHWM`` of
``/proc/self/status`` to what is resident now. Elsewhere ``ru_maxrss`` stands in, the largest
resident size since the process began; a call that stays below what the start of the process took
then reads as zero.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

if sys.platform != "win32":
    import resource

OUT_OF_MEMORY = "out of memory"
# What remains for the rest of the machine when a call takes all it can get.
_SHARE = 0.95
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_KILLED = -9


class ProbeError(Exception):
    """A measurement in another process failed; the message is the end of what it printed."""


class OutOfMemoryError(ProbeError):
    """It failed for want of memory."""


class Peak(NamedTuple):
    """Memory that a call took at its worst.

    Attributes:
        nbytes: Bytes above what was resident before.
        method: ``"VmHWM"`` or ``"ru_maxrss"``.
    """

    nbytes: int
    method: str


def peak_of(call: Callable[[], object]) -> Peak:
    """Run a call once and say how much resident memory rose.

    Args:
        call: What to run.

    Returns:
        The rise to the highest point, including what the call returns.

    Raises:
        ProbeError: The system tells neither figure.
    """
    _give_back_freed()
    if _reset_peak():
        before = _status("VmRSS")
        result = call()
        peak = Peak(max(0, _status("VmHWM") - before), "VmHWM")
    else:
        before = _highest()
        result = call()
        peak = Peak(_highest() - before, "ru_maxrss")
    del result
    return peak


def run_probe(task: Mapping[str, Any], *, threads: int, timeout: float | None = None) -> Peak:
    """Measure in a fresh process.

    Args:
        task: What ``performers.benchmark.probe`` reads.
        threads: Threads of torch there.
        timeout: Seconds to wait.

    Returns:
        The peak.

    Raises:
        OutOfMemoryError: There is not enough memory.
        ProbeError: It failed otherwise.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "performers.benchmark.probe"],
            input=json.dumps({**task, "threads": threads}),
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no result after {error.timeout:.0f} s") from error
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == _KILLED or is_out_of_memory(last):
        raise OutOfMemoryError(last if done.returncode != _KILLED else "killed by the system")
    if done.returncode:
        raise ProbeError(f"exit code {done.returncode}: {last}")
    return Peak(**json.loads(done.stdout.strip().splitlines()[-1]))


def memory_is_measurable() -> bool:
    """Whether the system tells a process how much memory it took."""
    return sys.platform != "win32"


def is_out_of_memory(error: Exception | str) -> bool:
    """Whether an error, or its text, says that memory ran out."""
    text = str(error)
    signs = ("MemoryError", "allocate memory", "bad_alloc", OUT_OF_MEMORY, "OutOfMemoryError")
    return isinstance(error, MemoryError | OutOfMemoryError) or any(sign in text for sign in signs)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Make allocations fail that the machine cannot serve, instead of ending the process.

    Linux promises more memory than there is and kills whoever uses it; with a limit on the
    process's own data, torch's allocator raises an error that can be caught.
    """
    available = _available_bytes()
    if sys.platform == "win32" or available is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status("VmData") + int(_SHARE * available)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def total_bytes() -> int | None:
    """Memory of the machine, where the system tells."""
    return _meminfo("MemTotal")


def _available_bytes() -> int | None:
    available = _meminfo("MemAvailable")
    if available is None or not _STATUS.exists():
        return None
    # A container may have less than the machine.
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, limit - used)


def _meminfo(name: str) -> int | None:
    try:
        return _kilobytes(Path("/proc/meminfo"), name)
    except OSError:
        return None


def _status(name: str) -> int:
    return _kilobytes(_STATUS, name)


def _kilobytes(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{path} has no line {name}")


def _highest() -> int:
    if sys.platform == "win32":
        raise ProbeError("peak memory is not measured on Windows")
    # Kilobytes, but for macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _give_back_freed() -> None:
    """What was freed before and is still resident would be used again unseen."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        # Not glibc.
        return


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
