"""Compiles the kernels without a GPU, just as their launchers would launch them, and counts what came out.

    echo '[{"name": ..., "kernel": "merge_weights", "architecture": 90, ...}]' | python ahead_of_time.py

Reads a list of cases (see `launch`) and prints one JSON object a line, with the counts of `report`, or with `unknown`
where this triton knows no such target. Ends with UNABLE where the tools are missing. Must run without TRITON_INTERPRET.
The launchers run on tensors without memory; in the place of the GPU stands a driver that knows only a target, in the
place of each kernel its own compilation. So settings, constexprs and the specialization of arguments (a stride of 4096
is a multiple of 16) are the launchers' and Triton's, not this file's.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from scalemerge.kernels import coefficient_grad, merge_weights, merged_linear, tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
UNABLE = 77
PROCESSORS = {80: 108, 90: 132, 100: 148}
KERNELS = {
    merge_weights: ["_merge_weights_kernel"],
    merged_linear: ["_merged_linear_kernel"],
    coefficient_grad: ["_coefficient_grad_kernel", "_gathered_products_kernel"],
}


class NoDevice:
    """As much of a Triton driver as compiling asks for. The device's number is its architecture."""

    architecture = 90

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Compiled:
    """kernel[grid](...) compiles instead of running and keeps the result."""

    last: Any = None

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            Compiled.last = self.kernel.warmup(*arguments, grid=grid, **options)

        return compile_only


def stand_in(device: NoDevice) -> None:
    """Put the driver and the compilations in their places; the kernel files ask `device` for its capability."""
    driver.set_active(device)
    tuning.processors = lambda _: PROCESSORS[device.architecture]
    for module, names in KERNELS.items():
        if hasattr(module, "capability"):
            module.capability = lambda _: device.architecture
        for name in names:
            setattr(module, name, Compiled(getattr(module, name)))


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def task_vectors(kinds: str, shape: list[int], dtype: torch.dtype) -> tuple[list[Any], list[Any], list[int]]:
    """values, scales and groups; kinds: "dense int8 int4:32", a group of 64 where none is given."""
    values, scales, groups = [], [], []
    for kind in kinds.split():
        name, _, size = kind.partition(":")
        group = 0 if name == "dense" else int(size or 64)
        width = -(-shape[1] // 2) if name == "int4" else shape[1]
        stored = {"dense": dtype, "int8": torch.int8, "int4": torch.uint8}[name]
        values.append(empty(shape[0], width, dtype=stored))
        scales.append(empty(shape[0], -(-shape[1] // group), dtype=torch.bfloat16) if group else empty(0, dtype=dtype))
        groups.append(group)
    return values, scales, groups


def launch(case: dict[str, Any]) -> None:
    """case: kernel, shape [N, K], vectors (see task_vectors), dtype, rows (M, or a block's in merge_weights)."""
    dtype = getattr(torch, case["dtype"])
    shape, rows, kernel = case["shape"], case["rows"], case["kernel"]
    vectors = task_vectors(case["vectors"], shape, dtype)
    base = empty(*shape, dtype=dtype)
    coefficients = [len(vectors[0]), shape[0]] if case.get("by_row") else [len(vectors[0])]
    c = empty(*coefficients, dtype=torch.float32)
    ids = empty(rows, dtype=torch.int64)
    if kernel == "merge_weights":
        index = ids if case.get("index") else None
        merge_weights.merge_weights_triton(base, *vectors, c, empty(rows, shape[1], dtype=dtype), index=index)
    elif kernel in ("merged_linear", "merged_linear_columns"):
        along_rows = kernel == "merged_linear"
        x = empty(rows, shape[1] if along_rows else shape[0], dtype=dtype)
        merged_linear.merged_linear_triton(x, base, *vectors, c, shape=shape, along_rows=along_rows)
    elif kernel == "coefficient_grad":
        left, right = empty(rows, shape[0], dtype=dtype), empty(rows, shape[1], dtype=dtype)
        coefficient_grad.coefficient_grad_triton(left, right, *vectors, per_row=bool(case.get("by_row")))
    elif kernel == "embedding_grad":
        coefficient_grad.gathered_products_triton(empty(rows, shape[1], dtype=dtype), *vectors, ids)
    else:
        raise ValueError(kernel)


def report(kernel: Any) -> dict[str, Any]:
    """Registers, memory and instructions of a compiled kernel.

    loads, copies (cp.async): how many of how many bytes; register_operands: wgmma with the left operand in registers;
    long_products: 64-bit multiplications; offsets: the types of what is added to tiles of pointers.
    """
    ptx, ttir = kernel.asm["ptx"], kernel.asm["ttir"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loads: collections.Counter[int] = collections.Counter()
    for vector, bits in re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    copied = re.findall(r"\bcp\.async\.c[ga]\.\S+ \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", ptx)
    copies = collections.Counter(int(size, 0) for size in copied)
    matrix = collections.Counter(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx))
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "loads": dict(loads),
        "copies": dict(copies),
        "matrix": dict(matrix),
        "register_operands": len(re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*\{", ptx)),
        "long_products": len(re.findall(r"\b(?:mul|mad)\.lo\.s64", ptx)),
        "offsets": sorted(set(re.findall(r"tt\.addptr .*, tensor<(?:\d+x)+(i\d+)>", ttir))),
        "instructions": sum(line.endswith(";") and not line.lstrip().startswith(".") for line in ptx.splitlines()),
    }


def main() -> None:
    if not CUOBJDUMP.is_file():
        print("this triton brings no cuobjdump", file=sys.stderr)
        sys.exit(UNABLE)
    device = NoDevice()
    stand_in(device)
    known = set()
    for case in json.load(sys.stdin):
        device.architecture = case["architecture"]
        started, Compiled.last = time.perf_counter(), None
        try:
            launch(case)
        except Exception as error:  # a target that nothing compiles for is unknown; any other fault is the kernel's
            if device.architecture in known or compiles(device):
                raise
            print(json.dumps({**case, "unknown": f"{type(error).__name__}: {error}"}), flush=True)
            continue
        known.add(device.architecture)
        counts = report(Compiled.last)
        print(json.dumps({**case, **counts, "seconds": round(time.perf_counter() - started, 2)}), flush=True)


@triton.jit
def _nothing(out, BLOCK: triton.language.constexpr):
    triton.language.store(out, BLOCK)


def compiles(device: NoDevice) -> bool:
    """Whether triton compiles anything at all for the device."""
    try:
        _nothing.warmup(empty(1, dtype=torch.int32), BLOCK=1, grid=(1,))
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main()
