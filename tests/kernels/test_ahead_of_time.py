"""What the compiler makes of every kernel at its settings, for three architectures; no GPU is needed.

No spills, shared memory within the architecture's, the matrix instruction where there is a product, wide loads, 64-bit
offsets. The compilations run in a process of their own (ahead_of_time.py), because this one may interpret kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scalemerge.kernels.tuning import SHARED_MEMORY

pytest.importorskip("triton", reason="triton is not installed")

HARNESS = Path(__file__).with_name("ahead_of_time.py")
UNABLE = 77  # the harness's status where it misses its tools
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCTS = ("merged_linear", "merged_linear_columns", "coefficient_grad")
KERNELS = ("merge_weights", "embedding_grad", *PRODUCTS)
DENSE, INT8, INT4 = " ".join(["dense"] * 4), " ".join(["int8"] * 4), " ".join(["int4"] * 4)
MIXED = "dense int8 int4:32 int8:256"


def case(kernel: str, architecture: int, vectors: str, **changes: Any) -> dict[str, Any]:
    usual = {"dtype": "bfloat16", "shape": [4096, 4096], "rows": 4096 if kernel == "coefficient_grad" else 64}
    return {**usual, "kernel": kernel, "architecture": architecture, "vectors": vectors, **changes}


def name_of(one: dict[str, Any]) -> str:
    kinds = one["vectors"].split()
    vectors = f"{len(kinds)}x{kinds[0]}" if len(set(kinds)) == 1 else "mixed"
    shape = "x".join(map(str, one["shape"]))
    extra = "-".join(key for key in ("by_row", "index") if one.get(key))
    parts = [one["kernel"], f"sm_{one['architecture']}", vectors, one["dtype"], shape, f"M{one['rows']}", extra]
    return "-".join(part for part in parts if part)


FAST = [case(kernel, architecture, DENSE) for kernel in KERNELS for architecture in MATRIX]
FAST += [case(kernel, 90, vectors) for kernel in KERNELS for vectors in (INT8, INT4)]
FAST += [case(kernel, 100, INT4) for kernel in PRODUCTS]
FAST += [case("merged_linear", 90, vectors, rows=256) for vectors in (DENSE, INT4)]

SLOW = [case(kernel, architecture, MIXED) for kernel in KERNELS for architecture in MATRIX]
SLOW += [
    case(kernel, architecture, " ".join(["dense"] * e))
    for kernel in KERNELS
    for architecture in MATRIX
    for e in (8, 16)
]
SLOW += [case(kernel, architecture, DENSE, dtype="float32") for kernel in KERNELS for architecture in MATRIX]
SLOW += [case(kernel, architecture, DENSE, shape=[384, 384]) for kernel in KERNELS for architecture in MATRIX]
SLOW += [
    case(kernel, architecture, DENSE, by_row=True)
    for kernel in KERNELS
    if kernel != "embedding_grad"
    for architecture in MATRIX
]
SLOW += [case(kernel, 80, vectors) for kernel in KERNELS for vectors in (INT8, INT4)]
SLOW += [case(kernel, 100, vectors) for kernel in KERNELS for vectors in (INT8, INT4)]
SLOW += [
    case(kernel, architecture, vectors, rows=rows)
    for kernel in PRODUCTS[:2]
    for architecture in MATRIX
    for vectors in (DENSE, INT8, INT4)
    for rows in (16, 256)
]
SLOW += [
    case("merge_weights", architecture, vectors, index=True) for architecture in MATRIX for vectors in (DENSE, INT4)
]
SLOW = [one for one in SLOW if one not in FAST]


def compiled(cases: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """The harness's counts by name. A case whose target this triton does not know comes back with `unknown`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS)], input=json.dumps(cases), capture_output=True, text=True, env=environment
    )
    if done.returncode == UNABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(cases)
    return {name_of(line): line for line in lines}


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return compiled(FAST, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return compiled(SLOW, tmp_path_factory.mktemp("triton"))


def check(counts: dict[str, Any]) -> None:
    if "unknown" in counts:
        pytest.skip(f"this triton does not know sm_{counts['architecture']}: {counts['unknown']}")
    kernel, architecture = counts["kernel"], counts["architecture"]
    kinds, half = counts["vectors"].split(), counts["dtype"] != "float32"
    loads, copies = ({int(size): number for size, number in counts[key].items()} for key in ("loads", "copies"))

    # for sm_100 the assembler holds a kernel at 128 registers of its own accord and puts one pair by
    put_by = 8 if architecture == 100 and counts["registers"] <= 128 else 0
    assert counts["stack"] <= put_by and not counts["local"], f"spills, at {counts['registers']} registers"
    assert counts["registers"] <= 255
    assert counts["shared"] <= SHARED_MEMORY[architecture]

    assert counts["offsets"] == ["i64"], "offsets of tiles are 64-bit numbers"
    assert counts["long_products"] > 0, "rows meet strides in 64 bit"

    assert loads.get(16, 0) + copies.get(16, 0) > 0
    narrow = loads.get(1, 0) + loads.get(2, 0)  # scales, at most a few a thread; never values one by one
    assert narrow <= 8 * sum(kind != "dense" for kind in kinds)
    if any(kind.startswith("int4") for kind in kinds):
        assert loads.get(8, 0) + copies.get(8, 0) >= sum(kind.startswith("int4") for kind in kinds)

    if kernel in PRODUCTS:
        assert copies, "tiles are copied to shared memory ahead of their use"
        if kernel != "coefficient_grad":
            assert not loads.get(16), "no wide load waits inside the loop"
        if half:
            few = kernel == "merged_linear_columns" and counts["rows"] < 64  # y = x W of less rows than wgmma takes
            assert counts["matrix"].get("mma.sync" if few else MATRIX[architecture]), counts["matrix"]
        if half and kernel == "merged_linear" and architecture == 90:
            assert counts["register_operands"] == counts["matrix"]["wgmma.mma_async"], (
                "the merged tile stays in registers"
            )


@pytest.mark.parametrize("name", map(name_of, FAST))
def test_compiled_as_intended(name: str, fast: dict[str, dict[str, Any]]) -> None:
    check(fast[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", map(name_of, SLOW))
def test_compiled_as_intended_at_other_settings(name: str, slow: dict[str, dict[str, Any]]) -> None:
    check(slow[name])
