"""Compile what calls launch for a GPU that is not there, and read what the assembler says of it.

``python -m tests.attention.triton.compiling 64 bfloat16`` prints a JSON list: of each kernel and
architecture the registers, stack, shared memory and matrix instructions; ``--write FILE`` rewrites
the table of a page. Calls run on meta tensors with their launches recorded, so what is compiled is
what a call on a GPU would compile.
"""

import argparse
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

from performers import GeneralizedFeatures, SoftmaxFeatures
from performers.attention.call import AttentionCall
from performers.attention.operators import Inputs
from performers.attention.triton import launcher, passes
from performers.attention.triton.block_sizes import Blocks
from performers.attention.triton.operators import Upstream

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def launches(
    capability: int, head_dim: int, features: int, dtype: torch.dtype, fn: str | None = None
) -> Iterator[Any]:
    """Launches of one call of each kind, forward and backward: ``(kernel, blocks, arguments)``.

    Of softmax features, or of a function ``fn``, which take no windows.
    """
    found = []

    def record(
        self: Any, kernel: Any, programs: int, *args: Any, blocks: Blocks, **constants: Any
    ) -> None:
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        found.append((kernel, blocks, arguments))

    launcher.Launcher.launch = record
    launcher.device_of = lambda device: (capability, 132)
    if fn is None:
        feature_map = SoftmaxFeatures(head_dim, features).to("meta")
    else:
        feature_map = GeneralizedFeatures(head_dim, features, fn=fn).to("meta")
    for options in calls():
        if fn is not None and "window" in options:
            continue
        batch = 1 if "cu_seqlens" in options else 2
        query, key, value = (
            torch.empty(batch, 4096, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
            for heads in (16, 8, 8)
        )
        call = AttentionCall(query, key, value, feature_map, **options).checked()
        inputs = Inputs.of(call)
        results = passes.forward(inputs)
        upstream = Upstream(torch.empty_like(results.out), None, None)
        passes.backward(upstream, inputs, results)
    query, key, value = (x[:, :, :1] for x in (query, key, value))
    call = AttentionCall(query, key, value, feature_map, is_causal=True).checked()
    passes.step(Inputs.of(call))
    return iter(found)


def calls() -> Iterator[dict[str, Any]]:
    """Options of calls that launch every kernel there is."""
    yield {}
    yield {"is_causal": True, "return_state": True}
    yield {"window": 128, "sinks": 4}
    yield {"is_causal": True, "cu_seqlens": torch.empty(5, dtype=torch.int32, device="meta")}


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel, specialised as a launch with these arguments specialises it."""
    signature, fixed, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
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


def compiled(
    kernel: Any, blocks: Blocks, arguments: dict[str, Any], capability: int
) -> dict[str, Any]:
    """Registers, stack, shared memory and matrix instructions of a kernel."""
    binary = triton.compile(
        source(kernel, arguments),
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
        "packed": bool(arguments.get("HAS_SEG")),
        "blocks": list(blocks),
        "registers": counts["REG"],
        "stack": counts["STACK"],
        "shared": binary.metadata.shared,
        "matrix": len(re.findall(r"\bH(?:G)?MMA\.", code)),
        "warpgroup": len(re.findall(r"\bHGMMA\.", code)),
    }


def measured(head_dim: int, dtype: torch.dtype, fn: str | None = None) -> list[dict[str, Any]]:
    """Every kernel for one head_dim and dtype, on both architectures, each variant once."""
    found = []
    for capability in (80, 90):
        seen = set()
        for kernel, blocks, arguments in launches(capability, head_dim, 256, dtype, fn):
            constants = [arguments[x.name] for x in kernel.params if x.is_constexpr]
            key = (kernel.__name__, *blocks, *map(str, constants))
            if key not in seen:
                seen.add(key)
                found.append(compiled(kernel, blocks, arguments, capability))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The largest of each number over the variants of a kernel, as Markdown."""
    kernels: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["kernel"], row["capability"], row["packed"], *row["blocks"])
        worst = kernels.setdefault(key, row)
        for name in ("registers", "stack", "shared", "matrix", "warpgroup"):
            worst[name] = max(worst[name], row[name])
    lines = [
        "| kernel | sm | features, rows, warps, stages | registers | stack | KB | HMMA, HGMMA |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(kernels.values(), key=lambda row: (row["kernel"], row["capability"])):
        name, capability = row["kernel"], row["capability"]
        name += ", packed" if row["packed"] else ""
        blocks = ", ".join(str(x or "-") for x in row["blocks"])
        products = f"{row['matrix'] - row['warpgroup']}, {row['warpgroup']}"
        lines.append(
            f"| {name} | {capability} | {blocks} | {row['registers']} | {row['stack']} | "
            f"{row['shared'] / 1024:.0f} | {products} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile every kernel for one head_dim and dtype; print JSON, or rewrite a table of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("head_dim", type=int)
    parser.add_argument("dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--fn", help="the function of generalized features")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    rows = measured(arguments.head_dim, getattr(torch, arguments.dtype), arguments.fn)
    if arguments.write is None:
        print(json.dumps(rows))
        return
    text = arguments.write.read_text()
    mark = f"<!-- {arguments.head_dim} {arguments.dtype} -->\n"
    before, _, after = text.split(mark)
    arguments.write.write_text(f"{before}{mark}{table(rows)}\n{mark}{after}")


if __name__ == "__main__":
    main()
