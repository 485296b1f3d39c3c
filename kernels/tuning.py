"""Tile settings of every kernel, and which way a product takes: the one place for both.

Nothing here has been measured on a GPU yet. The settings follow from budgets that can be counted: shared memory
(228 KiB on sm_90 and sm_100, 164 KiB on sm_80, a reserve kept) holds `stages` copies of all tiles that a loop
iteration loads; registers hold the accumulator. tests/kernels/test_ahead_of_time.py compiles each kernel at these
settings and checks the compiler's own counts. When a GPU has been measured, its row goes into MEASURED_FEW_ROWS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

#: bytes of shared memory that a block may use, by compute capability
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

#: rows up to which merging tiles in registers is used; device name -> rows. FACTS' roofline puts the crossing at 256.
MEASURED_FEW_ROWS: dict[str, int] = {}
FEW_ROWS = 256

#: bytes of one buffer of merged weights in the chunked strategy, by device type
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 16 * 2**20}


@dataclass(frozen=True)
class Tile:
    """rows and columns of the weight in a tile; depth: what is contracted at a time (or, few rows: rows of x)."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@lru_cache
def capability(device: torch.device) -> int:
    """Compute capability as a number, 90 for an H100. The interpreter counts as one."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power_of_two(number: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << max(0, number - 1).bit_length()))


def _stages(bytes_a_stage: int, architecture: int, most: int, kept: int = 0) -> int:
    """How many stages fit; kept: bytes that are needed once, whatever the stages."""
    budget = int(0.9 * SHARED_MEMORY.get(architecture, 101_376)) - kept
    return max(1, min(most, budget // bytes_a_stage))


def merge_tile(columns: int, group: int) -> Tile:
    """For merge_weights: bandwidth alone matters, so small tiles with wide rows within a quantization group."""
    width = _power_of_two(columns, 16, min(group, 128))
    return Tile(rows=max(1, 4096 // width), columns=width, depth=0, warps=4, stages=1)


def few_rows_tile(
    rows: int, outputs: int, experts: int, itemsize: int, group: int, architecture: int, *, along_rows: bool
) -> Tile:
    """For merged_linear. `rows` of x are all in one tile where they fit (depth); along_rows: y = x W'.

    The tile of the weight is rows x columns as W lies in memory, in one quantization group. The compiler keeps `stages`
    copies of the tile of x, one less of those of W0 and T_i, and one merged tile. More than 128 rows take 8 warps: with
    4 the sums fill the registers (sm_90, int4: 255 and spills), and two tiles of rows would read every weight twice.
    float32 products run outside the matrix unit, on operands in registers: larger tiles spill; so do 16 experts' of 64.
    """
    wide = itemsize < 4
    depth = _power_of_two(rows, 16, 256 if wide else 32)
    out_width = _power_of_two(outputs, 16, 64 if wide else 32)
    for contracted in (64, 32, 16) if wide and experts <= 8 else (32, 16):
        width = out_width if along_rows else min(out_width, group)
        inner = min(contracted, group) if along_rows else contracted
        merged, inputs = width * inner * itemsize, depth * inner * itemsize
        stages = 1 + _stages((experts + 1) * merged + inputs, architecture, 3, kept=merged + inputs)
        needed = (stages - 1) * ((experts + 1) * merged + inputs) + merged + inputs
        if needed <= SHARED_MEMORY.get(architecture, 101_376) or contracted == 16:
            break
    tile_rows, tile_columns = (width, inner) if along_rows else (inner, width)
    return Tile(tile_rows, tile_columns, depth, warps=8 if depth > 128 else 4, stages=stages)


def gradient_tile(rows: int, columns: int, length: int, itemsize: int, architecture: int) -> Tile:
    """For coefficient_grad: the shape of a good matrix product with both operands in shared memory."""
    wide = itemsize < 4
    tile_rows = _power_of_two(rows, 16, 128 if wide else 64)
    tile_columns = _power_of_two(columns, 16, 128 if wide else 64)
    depth = _power_of_two(length, 16, 64 if wide else 32)
    stages = _stages((tile_rows + tile_columns) * depth * itemsize, architecture, 4 if architecture >= 90 else 3)
    return Tile(tile_rows, tile_columns, depth, warps=8 if tile_rows * tile_columns >= 128 * 128 else 4, stages=stages)


def splits(programs: int, length: int, depth: int, device: torch.device) -> int:
    """Into how many parts a contraction is cut so that every processor has work: parts of 4 tiles at least."""
    wanted = -(-2 * processors(device) // max(1, programs))
    return max(1, min(wanted, length // (4 * depth)))


def smallest_group(groups: Sequence[int]) -> int:
    """The quantization group that a tile must fit in; dense ones set no limit (256)."""
    return min((group for group in groups if group), default=256)


def few_rows(device: torch.device) -> int:
    """Up to how many rows of x the weight is merged on the fly."""
    if device.type != "cuda":
        return 0
    return MEASURED_FEW_ROWS.get(torch.cuda.get_device_name(device), FEW_ROWS)


def chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
