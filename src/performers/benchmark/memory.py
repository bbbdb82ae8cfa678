"""Measures the peak memory of a call, in a separate process.

In one process the peak of an earlier call hides that of a later one, and reuse of freed memory is
not seen. Linux can reset the peak: writing 5 to ``/proc/self/clear_refs`` sets ``VmHWM`` of
``/proc/self/status`` to the resident size. Other systems give ``ru_maxrss``, the largest resident
size since the process began, so a call that stays below the memory of the start-up reads as zero.
"""

import ctypes
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch

if sys.platform != "win32":
    import resource

# The share of available memory that a call may take.
_SHARE = 0.95
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_KILLED = -9
_LAUNCHER = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
_Result = TypeVar("_Result")


class ProbeError(Exception):
    """A process failed; the message is the last line of its error output."""


class OutOfMemoryError(ProbeError):
    """A process failed because memory ran out."""


class Peak(NamedTuple):
    """Bytes above the resident size before a call, or above what was allocated on a GPU."""

    nbytes: int
    method: str
    """``"VmHWM"``, ``"ru_maxrss"`` or ``"CUDA allocator"``."""


def peak_of(call: Callable[[], object], device: torch.device | None = None) -> Peak:
    """Run a call once and measure the rise of resident memory to its peak, result included.

    On a CUDA ``device`` the memory is that which torch has allocated there.

    Raises:
        ProbeError: The system is Windows, which tells neither figure.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, "CUDA allocator")
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


def run_apart(
    function: Callable[[], _Result], *, threads: int, timeout: float | None = None
) -> _Result:
    """Call a function in a fresh process.

    Args:
        function: A function of a module, or a partial of one; it, its arguments and its result are
            pickled.
        threads: Threads of torch in the process.
        timeout: Seconds to wait.

    Raises:
        OutOfMemoryError: Memory ran out.
        ProbeError: The process failed otherwise.
    """
    # A launcher's variables would make the process wait for others.
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(threads)],
            input=pickle.dumps(function).hex(),
            capture_output=True,
            text=True,
            env={**environment, "OMP_NUM_THREADS": str(threads)},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no result after {error.timeout:.0f} s") from error
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == _KILLED:
        # Linux kills a process that takes too much memory; so may a user.
        raise OutOfMemoryError("killed (out of memory?)")
    if is_out_of_memory(last):
        raise OutOfMemoryError(last)
    if done.returncode:
        raise ProbeError(f"exit code {done.returncode}: {last}")
    result: _Result = pickle.loads(bytes.fromhex(done.stdout.strip().splitlines()[-1]))
    return result


def memory_is_measurable() -> bool:
    """True where the system tells a process its peak memory."""
    return sys.platform != "win32"


def is_out_of_memory(error: Exception | str) -> bool:
    """True for an error (or its text) that says that memory ran out."""
    text = str(error)
    signs = ("MemoryError", "allocate memory", "bad_alloc", "out of memory", "OutOfMemoryError")
    return isinstance(error, MemoryError | OutOfMemoryError) or any(sign in text for sign in signs)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Make allocations fail that the machine cannot serve, instead of ending the process.

    Linux promises more memory than there is and kills whoever uses it; with a limit on the
    process's own data, torch's allocator raises an error that can be caught.
    """
    if sys.platform == "win32" or not _STATUS.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status("VmData") + int(_SHARE * _available_bytes())
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _available_bytes() -> int:
    available: int = psutil.virtual_memory().available
    # A container may have less than the machine.
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, limit - used)


def _status(name: str) -> int:
    """Bytes of a line of ``/proc/self/status``."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def _highest() -> int:
    if sys.platform == "win32":
        raise ProbeError("peak memory is not measured on Windows")
    # Kilobytes, but for macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _give_back_freed() -> None:
    """Return freed memory to the system, which would be used again without a rise."""
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


def _main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    function = pickle.loads(bytes.fromhex(sys.stdin.read()))
    with limited_memory():
        result = function()
    print(pickle.dumps(result).hex())


if __name__ == "__main__":
    _main()
