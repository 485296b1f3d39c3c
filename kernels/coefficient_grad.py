"""Gradients of the merging coefficients of y = x W(c)':  dc_i = <dY' x, T_i>.

One weight-gradient product serves all experts. The kernel keeps a tile of dW in registers, multiplies it with the same
tile of every T_i and writes E numbers a tile: dW never exists. The reference makes dW for a block at a time. Cost:
2 M N K FLOPs for dW, 2 E N K for the inner products, one read of every T_i.

    coefficient_grad             dc of a product, from its two factors (a custom op; not differentiated again)
    embedding_coefficient_grad   dc of an embedding y = W(c)[ids], in scatter form: dc_i = <dY, T_i[ids]>
    inner_products               <G, T_i> of a gradient that exists already (norm weights, biases)

No atomics: each program writes its own partial sums, which are added in float64 in a fixed order afterwards, so that
repeats give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalemerge.kernels.formats import accumulation_dtype, dequantize_into, unpack
from scalemerge.kernels.merge_weights import DEQUANTIZED, block_in, matrix
from scalemerge.kernels.tiles import (
    dot_dtype,
    jit,
    kinds_of,
    require_rows,
    strides_of,
    task_vector_tile,
    tl,
    triton,
    use_triton,
)
from scalemerge.kernels.tuning import capability, gradient_tile, merge_tile, smallest_group, splits
from scalemerge.kernels.workspace import workspace

GRADIENT = 0  # workspace slot: one block of dW (reference only); the merged block has been used up by then


@jit
def _coefficient_grad_kernel(
    partial,
    left,
    right,
    values,
    scales,
    length,
    row_count,
    column_count,
    first_row,
    first_column,
    left_stride,
    right_stride,
    value_strides,
    scale_strides,
    EXPERTS: tl.constexpr,
    KINDS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[program, e] = <(left' right) tile, T_e tile>; the contraction is cut into SPLITS parts.

    PER_ROW: partial[tile of columns and part, e, row] instead, summed along the row only.
    """
    program = tl.program_id(0)
    tiles_across = tl.cdiv(column_count, BLOCK_COLUMNS)
    part = program % SPLITS
    tile = program // SPLITS
    rows = (tile // tiles_across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (tile % tiles_across).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < row_count
    column_mask = columns < column_count
    gradient = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(part, tl.cdiv(length, BLOCK_DEPTH), SPLITS):
        depth = (step * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
        depth_mask = depth < length
        left_tile = tl.load(  # read transposed: so it too is copied to shared memory ahead of time on sm_80
            left + depth[None, :] * left_stride + rows[:, None],
            mask=depth_mask[None, :] & row_mask[:, None],
            other=0.0,
        )
        right_tile = tl.load(
            right + depth[:, None] * right_stride + columns[None, :],
            mask=depth_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        gradient = tl.dot(left_tile.to(DOT_DTYPE), right_tile.to(DOT_DTYPE), gradient, input_precision=PRECISION)
    for e in tl.static_range(EXPERTS):
        vector = task_vector_tile(
            values[e],
            scales[e],
            value_strides[e],
            scale_strides[e],
            rows[:, None] + first_row,
            row_mask[:, None],
            first_column + (tile % tiles_across).to(tl.int64) * BLOCK_COLUMNS,
            first_column + column_count,
            KINDS[e],
            GROUPS[e],
            BLOCK_COLUMNS,
        )
        if PER_ROW:
            place = (((tile % tiles_across) * SPLITS + part).to(tl.int64) * EXPERTS + e) * row_count + rows
            tl.store(partial + place, tl.sum(gradient * vector, 1), mask=row_mask)
        else:
            tl.store(partial + program.to(tl.int64) * EXPERTS + e, tl.sum(gradient * vector))


def coefficient_grad_triton(
    left: Tensor,
    right: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    *,
    first_row: int = 0,
    first_column: int = 0,
    per_row: bool = False,
    parts: int | None = None,
) -> Tensor:
    """<left' right, T_i[first_row: , first_column:]> for all i, [E] float64; per_row: row by row, [E, N].

    left: [M, N]; right: [M, K]. For y = x W' they are dY and x. parts: into how many the contraction is cut; chosen
    when not given. With quantized task vectors first_column must be a multiple of the group sizes, or of the tile's
    columns where those are fewer: ValueError.
    """
    require_rows(left, right, *values, *scales)
    rows, columns, length = left.shape[1], right.shape[1], right.shape[0]
    tile = gradient_tile(rows, columns, length, right.element_size(), capability(right.device))
    for group in filter(None, groups):
        if first_column % min(group, tile.columns):
            raise ValueError(f"first_column {first_column} is not a multiple of {min(group, tile.columns)}")
    across = triton.cdiv(columns, tile.columns)
    tiles = triton.cdiv(rows, tile.rows) * across
    if not tiles or not length:
        return torch.zeros(len(values), *([rows] if per_row else []), dtype=torch.float64, device=right.device)
    parts = parts or splits(tiles, length, tile.depth, right.device)
    sums = (across * parts, len(values), rows) if per_row else (tiles * parts, len(values))
    partial = torch.empty(sums, dtype=torch.float32, device=right.device)
    _coefficient_grad_kernel[(tiles * parts,)](
        partial,
        left,
        right,
        tuple(values),
        tuple(scales),
        length,
        rows,
        columns,
        first_row,
        first_column,
        left.stride(0),
        right.stride(0),
        strides_of(values),
        strides_of(scales),
        EXPERTS=len(values),
        KINDS=kinds_of(values, groups),
        GROUPS=tuple(groups),
        PER_ROW=per_row,
        SPLITS=parts,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_DEPTH=tile.depth,
        DOT_DTYPE=dot_dtype(right.dtype),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return partial.sum(0, dtype=torch.float64)


def coefficient_grad_reference(
    left: Tensor,
    right: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    shape: Sequence[int],
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    *,
    per_row: bool = False,
) -> Tensor:
    """The same in plain torch, for the block T_i[rows, columns] of weights of `shape`.

    left: [M, rows]; right: [M, columns]. Returns [E] or [E, rows] float64. The block of dW is made in the reused buffer
    GRADIENT.
    """
    dtype = accumulation_dtype(right.dtype)
    size = (left.shape[1], right.shape[1])
    dw = workspace(GRADIENT, size, dtype, right.device)
    if right.dtype == dtype:
        torch.mm(left.T, right, out=dw)
    else:
        dw.copy_(torch.mm(left.T, right, out=workspace(DEQUANTIZED, size, right.dtype, right.device)))
    dots = []
    for vector in (unpack(*one, shape) for one in zip(values, scales, groups)):
        part = block_in(dtype, vector, rows, columns)
        if per_row:
            product = torch.mul(dw, part, out=workspace(DEQUANTIZED, part.shape, dtype, part.device))
            dots.append(product.sum(1).double())
            continue
        if not part.is_contiguous():
            part = workspace(DEQUANTIZED, part.shape, dtype, part.device).copy_(part)
        dots.append(torch.dot(dw.view(-1), part.view(-1)).double())
    return torch.stack(dots)


@torch.library.custom_op("scalemerge::coefficient_grad", mutates_args=())
def coefficient_grad(
    left: Tensor,
    right: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    shape: Sequence[int],
    row_start: int,
    row_stop: int,
    column_start: int,
    column_stop: int,
    per_row: bool,
) -> Tensor:
    """dc [E] float64 (per_row: [E, rows]) of a block, [row_start, row_stop) x [column_start, column_stop).

    left: [M, rows of the block]; right: [M, its columns]; shape: the whole weight's.
    """
    rows, columns = (row_start, row_stop), (column_start, column_stop)
    if use_triton(right):
        return coefficient_grad_triton(
            left,
            right,
            values,
            scales,
            groups,
            first_row=row_start,
            first_column=column_start,
            per_row=per_row,
        )
    return coefficient_grad_reference(left, right, values, scales, groups, shape, rows, columns, per_row=per_row)


@coefficient_grad.register_fake
def _(left: Any, right: Any, values: Any, *rest: Any) -> Any:
    per_row = rest[-1]
    return right.new_empty(len(values), *([left.shape[1]] if per_row else []), dtype=torch.float64)


@jit
def _gathered_products_kernel(
    partial,
    ids,
    gradient,
    values,
    scales,
    token_count,
    column_count,
    gradient_stride,
    value_strides,
    scale_strides,
    EXPERTS: tl.constexpr,
    KINDS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """partial[program, e] = <gradient tile, T_e[ids] tile>, or T_e itself where HAS_INDEX is false."""
    program = tl.program_id(0)
    tiles_across = tl.cdiv(column_count, BLOCK_COLUMNS)
    first_column = (program % tiles_across).to(tl.int64) * BLOCK_COLUMNS
    own_rows = ((program // tiles_across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    columns = (first_column + tl.arange(0, BLOCK_COLUMNS))[None, :]
    row_mask = own_rows < token_count
    mask = row_mask & (columns < column_count)
    tile = tl.load(gradient + own_rows * gradient_stride + columns, mask=mask, other=0.0).to(tl.float32)
    rows = tl.load(ids + own_rows, mask=row_mask, other=0).to(tl.int64) if HAS_INDEX else own_rows
    for e in tl.static_range(EXPERTS):
        vector = task_vector_tile(
            values[e],
            scales[e],
            value_strides[e],
            scale_strides[e],
            rows,
            row_mask,
            first_column,
            column_count,
            KINDS[e],
            GROUPS[e],
            BLOCK_COLUMNS,
        )
        tl.store(partial + program.to(tl.int64) * EXPERTS + e, tl.sum(tile * vector))


def gathered_products_triton(
    gradient: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    ids: Tensor | None = None,
) -> Tensor:
    """<G, T_i[ids]> (or <G, T_i> without ids) for all i, [E] float64. gradient: [M, K]; ids: [M]."""
    require_rows(gradient, *values, *scales)
    tile = merge_tile(gradient.shape[1], smallest_group(groups))
    programs = triton.cdiv(gradient.shape[0], tile.rows) * triton.cdiv(gradient.shape[1], tile.columns)
    if not programs:
        return torch.zeros(len(values), dtype=torch.float64, device=gradient.device)
    partial = torch.empty(programs, len(values), dtype=torch.float32, device=gradient.device)
    _gathered_products_kernel[(programs,)](
        partial,
        gradient if ids is None else ids,
        gradient,
        tuple(values),
        tuple(scales),
        gradient.shape[0],
        gradient.shape[1],
        gradient.stride(0),
        strides_of(values),
        strides_of(scales),
        EXPERTS=len(values),
        KINDS=kinds_of(values, groups),
        GROUPS=tuple(groups),
        HAS_INDEX=ids is not None,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    return partial.sum(0, dtype=torch.float64)


def gathered_products_reference(
    gradient: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    ids: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, summed in float32 or better; gradient may have any shape where ids are not given."""
    flat = gradient.reshape(-1).to(accumulation_dtype(gradient.dtype))
    dots = []
    for value, scale, group in zip(values, scales, groups):
        rows = value if ids is None else value[ids]
        if group:
            own_scale = scale if ids is None else scale[ids]
            rows = dequantize_into(torch.empty_like(gradient, dtype=flat.dtype), rows, own_scale, group)
        dots.append(torch.dot(flat, rows.reshape(-1).to(flat.dtype)).double())
    return torch.stack(dots)


def inner_products(
    gradient: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], groups: Sequence[int]
) -> Tensor:
    """<G, T_i> of a gradient that exists, of any shape. Returns [E] float64."""
    if use_triton(gradient):
        flat = [matrix(value) for value in values]
        return gathered_products_triton(matrix(gradient).contiguous(), flat, scales, groups)
    return gathered_products_reference(gradient, values, scales, groups)


@torch.library.custom_op("scalemerge::embedding_coefficient_grad", mutates_args=())
def embedding_coefficient_grad(
    ids: Tensor,
    gradient: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
) -> Tensor:
    """dc_i = <dY, T_i[ids]> of y = W(c)[ids], without a gradient the size of the vocabulary.

    ids: [M]; gradient: [M, K]; T_i: [V, K]. Returns [E] float64.
    """
    if use_triton(gradient):
        return gathered_products_triton(gradient.contiguous(), values, scales, groups, ids)
    return gathered_products_reference(gradient, values, scales, groups, ids)


@embedding_coefficient_grad.register_fake
def _(ids: Any, gradient: Any, values: Any, scales: Any, groups: Any) -> Any:
    return gradient.new_empty(len(values), dtype=torch.float64)
