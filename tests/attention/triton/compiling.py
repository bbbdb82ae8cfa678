"""Compile what calls launch for a GPU that is not there, and read what the assembler says of it.

``python -m tests.attention.triton.compiling 64`` prints one JSON object a line: kernel, dtype,
architecture, registers, stack, shared memory, matrix instructions. Calls run on meta tensors with
their launches recorded, so what is compiled is what a call on a GPU would compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from performers import SoftmaxFeatures
from performers.attention.call import AttentionCall
from performers.attention.native.operators import Inputs, Upstream
from performers.attention.triton import launch

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


def launches(capability: int, head_dim: int, features: int, dtype: torch.dtype) -> Iterator[Any]:
    """What one call of each kind launches, forward and backward: ``(kernel, args, options)``."""
    found = []

    def record(self: Any, kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        found.append((kernel, args, options))

    launch.Launcher.launch = record
    launch._device = lambda device: (capability, 132)
    feature_map = SoftmaxFeatures(head_dim, features).to("meta")
    for options in CALLS:
        query, key, value = (
            torch.empty(2, 4096, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
            for heads in (16, 8, 8)
        )
        call = AttentionCall(query, key, value, feature_map, **options).checked()
        inputs = Inputs.of(call)
        results = launch.forward(inputs)
        upstream = Upstream(torch.empty_like(results.out), None, None, None)
        launch.backward(upstream, inputs, results)
    return iter(found)


CALLS: tuple[dict[str, Any], ...] = ({}, {"is_causal": True})


def source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """The kernel, specialised as a launch with these arguments specialises it."""
    constants = {
        **dict(zip(kernel.arg_names, args, strict=False)),
        **{name: value for name, value in options.items() if name != "blocks"},
    }
    signature, fixed, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, constants[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name] = "constexpr"
            fixed[(index,)] = value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, fixed, attributes)


def compiled(kernel: Any, args: Any, options: Any, capability: int) -> dict[str, Any]:
    """Registers, stack, shared memory and matrix instructions of a kernel."""
    blocks = options["blocks"]
    binary = triton.compile(
        source(kernel, args, options),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    counts = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "blocks": list(blocks),
        "registers": counts["REG"],
        "stack": counts["STACK"],
        "shared": binary.metadata.shared,
        "matrix": len(re.findall(r"\bH(?:G)?MMA\.", code)),
        "warpgroup": len(re.findall(r"\bHGMMA\.", code)),
    }


def main() -> None:
    """Compile every kernel for one head_dim."""
    head_dim, *only = sys.argv[1:]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if only and str(dtype).removeprefix("torch.") not in only:
            continue
        for capability in (80, 90):
            seen = set()
            for kernel, args, options in launches(capability, int(head_dim), 256, dtype):
                variant = tuple(sorted((k, str(v)) for k, v in options.items()))
                if (kernel.__name__, variant) in seen:
                    continue
                seen.add((kernel.__name__, variant))
                found = compiled(kernel, args, options, capability)
                found["dtype"] = str(dtype).removeprefix("torch.")
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
