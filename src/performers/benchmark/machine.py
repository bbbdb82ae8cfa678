"""Describes the machine and the software of a measurement."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil
import torch

from performers import backends
from performers.app.provenance import provenance, version
from performers.attention.native import library

# Those that decide how wide the products are.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")
_LIBRARIES = ("performer-pytorch", "pytorch-fast-transformers", "flash-linear-attention", "triton")


def describe(threads: int) -> dict[str, Any]:
    """The processor, the software and the settings that times depend on, as JSON can hold them."""
    origin = provenance("benchmark")
    no_kernels = library.unavailable_reason()
    # x86 says flags, ARM says Features.
    words = _processor("flags|Features").split()
    return {
        "cpu": _processor("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in _FLAGS if flag in words],
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_parallel": parallel_info(torch.__config__.parallel_info()),
        "threads": threads,
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "performers": version("performers"),
        "backends": list(backends()),
        "native": f"not available: {no_kernels}" if no_kernels else library.isa(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "date": origin["date"],
        "command": origin["command"],
    }


def parallel_info(text: str) -> dict[str, str]:
    """Pools of threads, their libraries and variables, from ``torch.__config__.parallel_info``."""
    wanted = re.compile(
        r"^\s*(ATen parallel backend|OpenMP|omp_get_max_threads\(\)|mkl_get_max_threads\(\)"
        r"|[A-Z]+_NUM_THREADS|at::get_num_interop_threads\(\))\s*:?\s(.*)$"
    )
    found = (wanted.match(line) for line in text.splitlines())
    return {match[1]: match[2].lstrip(": ").strip() for match in found if match}


def _processor(name: str) -> str:
    """The line of a name in Linux' description of its first processor, or nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^({name})\s*:(.*)$", text, re.MULTILINE)
    return found[2].strip() if found else ""
