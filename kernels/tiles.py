"""What the Triton kernels share: tiles of task vectors and of merged weights in registers, and when Triton runs.

A kernel gets the E task vectors of a weight as a tuple of pointers, unrolled at compile time, so that dense, int8 and
int4 ones may be mixed without a copy. KINDS[e] is 0 (dense), 8 or 4; GROUPS[e] the columns of a scale.
All row and column numbers are int64 before they meet a stride: int32 overflows on large weights.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors; there, tl.dot is wrong for bfloat16 (measured), so tiles
go into it as float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this system: the torch references serve
    triton = None
    from scalemerge.kernels import absent as tl  # type: ignore[no-redef]


def jit(function: Any) -> Any:
    """triton.jit where there is triton; else the plain function, which nothing calls."""
    return triton.jit(function) if triton is not None else function


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter (read when they were decorated)."""
    return triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """On CUDA tensors, but for float64, which the references take."""
    return triton is not None and tensor.is_cuda and tensor.dtype != torch.float64


def dot_dtype(dtype: torch.dtype) -> Any:
    """What tiles are cast to before tl.dot: the activations' dtype, float32 in the interpreter."""
    if interpreted():
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


def kinds_of(values: Sequence[Tensor], groups: Sequence[int]) -> tuple[int, ...]:
    """KINDS of the kernels, from the value tensors and their group sizes (0: dense)."""
    return tuple(0 if group == 0 else (4 if value.dtype == torch.uint8 else 8) for value, group in zip(values, groups))


def strides_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Row strides; 0 for the empty scales of a dense task vector."""
    return tuple(tensor.stride(0) if tensor.dim() == 2 else 0 for tensor in tensors)


def coefficient_rows(coefficients: Tensor) -> int:
    """COEFFICIENT_ROWS of the kernels."""
    return coefficients.shape[1] if coefficients.dim() == 2 else 0


def require_rows(*tensors: Tensor) -> None:
    """The kernels step along columns one by one: ValueError for a matrix whose last stride is not 1."""
    for tensor in tensors:
        if tensor.dim() == 2 and tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"a matrix must be row-major, this one has strides {tensor.stride()}")


@jit
def task_vector_tile(
    values,
    scales,
    value_stride,
    scale_stride,
    rows,
    row_mask,
    first_column,
    column_stop,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """T[rows, first_column : first_column + COLUMNS] in float32. rows: int64 [R, 1]; first_column: int64.

    Zero where row_mask is false and from column_stop on, but for the other half of int4's last byte. The tile lies in
    one quantization group or is made of whole ones. Bytes and scales are read once each and spread out afterwards,
    because a load per element is neither wide nor shared.
    """
    if KIND == 4:
        places = first_column // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        inside = row_mask & (places < column_stop - column_stop // 2)  # rounded up
        packed = tl.load(values + rows * value_stride + places, mask=inside, other=136)
        tile = tl.interleave(packed & 15, packed >> 4).to(tl.float32) - 8
    else:
        columns = first_column + tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(values + rows * value_stride + columns, mask=row_mask & (columns < column_stop), other=0)
        tile = tile.to(tl.float32)
    if KIND != 0:
        if COLUMNS <= GROUP:
            scale = tl.load(scales + rows * scale_stride + first_column // GROUP, mask=row_mask, other=0.0)
            tile = tile * scale.to(tl.float32)
        else:
            groups = first_column // GROUP + tl.arange(0, COLUMNS // GROUP)[None, :]
            inside = row_mask & (groups * GROUP < column_stop)
            scale = tl.load(scales + rows * scale_stride + groups, mask=inside, other=0.0).to(tl.float32)
            grouped = tl.reshape(tile, (tile.shape[0], COLUMNS // GROUP, GROUP)) * scale[:, :, None]
            tile = tl.reshape(grouped, (tile.shape[0], COLUMNS))
    return tile


@jit
def merged_tile(
    base,
    values,
    scales,
    coefficients,
    base_stride,
    value_strides,
    scale_strides,
    rows,
    row_mask,
    first_column,
    column_stop,
    KINDS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    COEFFICIENT_ROWS: tl.constexpr,
):
    """(W0 + sum_i c_i T_i)[rows, first_column : first_column + COLUMNS] in float32, masked as task_vector_tile does.

    Without W0 where HAS_BASE is false. COEFFICIENT_ROWS: 0 where c is [E]; N where it is [E, N], a coefficient for each
    row of the weight.
    """
    if HAS_BASE:
        total = task_vector_tile(base, base, base_stride, 0, rows, row_mask, first_column, column_stop, 0, 0, COLUMNS)
    else:
        total = tl.zeros((rows.shape[0], COLUMNS), tl.float32)
    for e in tl.static_range(len(KINDS)):
        tile = task_vector_tile(
            values[e],
            scales[e],
            value_strides[e],
            scale_strides[e],
            rows,
            row_mask,
            first_column,
            column_stop,
            KINDS[e],
            GROUPS[e],
            COLUMNS,
        )
        if COEFFICIENT_ROWS == 0:
            total += tl.load(coefficients + e) * tile
        else:
            total += tl.load(coefficients + e * COEFFICIENT_ROWS + rows, mask=row_mask, other=0.0) * tile
    return total
