"""Merge a block of a weight: W(c) = W0 + sum_i c_i T_i, into a buffer of the caller's.

Sums are made in float32 (float64 for float64 weights) and rounded once to the buffer's dtype, because adding small
deltas one by one in bfloat16 rounds them away. Cost for n elements and E experts: 2 E n FLOPs, one read of W0 and of
every T_i, one write: bandwidth alone. Task vectors may be dense, int8 and int4, mixed.

    merge_weights           Triton on a GPU, else the torch reference; not differentiable
    merged_weight           the whole merged tensor as a custom op, differentiable in c:  dc_i = <dW, T_i>
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scalemerge.kernels.formats import Quantized, TaskVector, accumulation_dtype, dense_block, unpack
from scalemerge.kernels.tiles import (
    coefficient_rows,
    jit,
    kinds_of,
    merged_tile,
    require_rows,
    strides_of,
    tl,
    triton,
    use_triton,
)
from scalemerge.kernels.tuning import merge_tile, smallest_group
from scalemerge.kernels.workspace import workspace

DEQUANTIZED = 1  # workspace slot: one chunk of an int8 or int4 task vector as float32 (reference only)


@jit
def _merge_weights_kernel(
    out,
    base,
    values,
    scales,
    coefficients,
    index,
    row_count,
    column_count,
    first_row,
    first_column,
    out_stride,
    base_stride,
    value_strides,
    scale_strides,
    KINDS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    COEFFICIENT_ROWS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[r, k] = merged weight at row first_row + r (or index[r]) and column first_column + k."""
    own_rows = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    own_columns = (tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    row_mask = own_rows < row_count
    mask = row_mask & (own_columns < column_count)
    rows = tl.load(index + own_rows, mask=row_mask, other=0).to(tl.int64) if HAS_INDEX else own_rows + first_row
    total = merged_tile(
        base,
        values,
        scales,
        coefficients,
        base_stride,
        value_strides,
        scale_strides,
        rows,
        row_mask,
        first_column + tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS,
        first_column + column_count,
        KINDS,
        GROUPS,
        BLOCK_COLUMNS,
        HAS_BASE,
        COEFFICIENT_ROWS,
    )
    tl.store(out + own_rows * out_stride + own_columns, total, mask=mask)


def merge_weights_triton(
    base: Tensor | None,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    coefficients: Tensor,
    out: Tensor,
    *,
    first_row: int = 0,
    first_column: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Fill out [r, k] with the block that starts at (first_row, first_column), or with rows `index` [r].

    base: [N, K] or None for the delta alone; coefficients: [E] (or [E, N], one a row).
    With quantized task vectors, first_column must be a multiple of their group sizes. Returns out.
    """
    require_rows(out, *values, *scales, *([] if base is None else [base]))
    group = smallest_group(groups)
    tile = merge_tile(out.shape[1], group)
    if any(groups) and first_column % tile.columns:
        raise ValueError(f"first_column {first_column} is not a multiple of {tile.columns}, the columns of a tile")
    grid = (triton.cdiv(out.shape[0], tile.rows), triton.cdiv(out.shape[1], tile.columns))
    if not all(grid):
        return out
    _merge_weights_kernel[grid](
        out,
        out if base is None else base,
        tuple(values),
        tuple(scales),
        coefficients.float().contiguous(),
        out if index is None else index,
        out.shape[0],
        out.shape[1],
        first_row,
        first_column,
        out.stride(0),
        0 if base is None else base.stride(0),
        strides_of(values),
        strides_of(scales),
        KINDS=kinds_of(values, groups),
        GROUPS=tuple(groups),
        HAS_BASE=base is not None,
        COEFFICIENT_ROWS=coefficient_rows(coefficients),
        HAS_INDEX=index is not None,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    return out


def merge_weights_reference(
    base: Tensor | None,
    task_vectors: Iterable[TaskVector],
    coefficients: Sequence[float | Tensor],
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The block W(c)[rows, columns] in plain torch.

    base: [N, ...], or None for sum_i c_i T_i alone (then `out` is needed); task_vectors: E of the same shape (a
    generator is read one at a time); coefficients: E numbers, or tensors that broadcast against the block; rows,
    columns: (start, stop), all by default. out: buffer of the block's shape and the dtype wanted; made in the
    accumulation dtype when not given.
    """
    block = None if base is None else dense_block(base, rows, columns)
    like = block if block is not None else out
    assert like is not None, "without a base, give out"
    dtype = accumulation_dtype(like.dtype)
    direct = out is not None and out.dtype == dtype
    total = out if direct and out is not None else torch.empty(like.shape, dtype=dtype, device=like.device)
    started = False
    for coefficient, vector in zip(coefficients, task_vectors, strict=True):
        by_row = isinstance(coefficient, Tensor)
        if not by_row and coefficient == 0.0:
            continue
        part = block_in(dtype, vector, rows, columns)
        if not started and not by_row and block is not None and block.dtype == dtype:
            torch.add(block, part, alpha=coefficient, out=total)  # type: ignore[arg-type]
        else:
            if not started:
                _start(total, block)
            if isinstance(coefficient, Tensor):
                total.addcmul_(part, coefficient)
            else:
                total.add_(part, alpha=coefficient)
        started = True
    if not started:
        _start(total, block)
    return total if out is None or direct else out.copy_(total)


def block_in(
    dtype: torch.dtype, vector: TaskVector, rows: tuple[int, int] | None, columns: tuple[int, int] | None
) -> Tensor:
    """T[rows, columns] in `dtype`: a view where it lies so, else in the reused buffer DEQUANTIZED."""
    if isinstance(vector, Tensor):
        part = dense_block(vector, rows, columns)
        return part if part.dtype == dtype else workspace(DEQUANTIZED, part.shape, dtype, part.device).copy_(part)
    shape = [stop - start for start, stop in (rows or (0, vector.shape[0]), columns or (0, vector.shape[1]))]
    device = vector.values.device if isinstance(vector, Quantized) else vector.a.device
    return dense_block(vector, rows, columns, dtype=dtype, out=workspace(DEQUANTIZED, shape, dtype, device))


def _start(total: Tensor, block: Tensor | None) -> None:
    """The base block, or zeros without one."""
    if block is None:
        total.zero_()
    else:
        total.copy_(block)


def merge_weights(
    base: Tensor | None,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    coefficients: Tensor,
    shape: Sequence[int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: Tensor,
) -> Tensor:
    """The block W(c)[rows, columns] of a weight of `shape` into out, by Triton or in torch; see the two above.

    coefficients: [E], or [E, N] for one a row of the weight.
    """
    if use_triton(out):
        return merge_weights_triton(
            base, values, scales, groups, coefficients, out, first_row=rows[0], first_column=columns[0]
        )
    vectors = [unpack(*one, shape) for one in zip(values, scales, groups)]
    whole = tuple(columns) == (0, shape[1])
    by_row = coefficients.dim() == 2
    c = list(coefficients[:, slice(*rows), None].to(accumulation_dtype(out.dtype))) if by_row else coefficients.tolist()
    return merge_weights_reference(base, vectors, c, rows, None if whole else columns, out=out)


def matrix(tensor: Tensor) -> Tensor:
    """A vector as a matrix of one row: the kernels know matrices only."""
    return tensor.view(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)


@torch.library.custom_op("scalemerge::merged_weight", mutates_args=())
def merged_weight(
    base: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], groups: Sequence[int], coefficients: Tensor
) -> Tensor:
    """W0 + sum_i c_i T_i whole, in W0's dtype, differentiable in the coefficients [E]. Meant for small weights."""
    if use_triton(base):
        out = torch.empty_like(base)
        flat = [matrix(value) for value in values]
        merge_weights_triton(matrix(base), flat, scales, groups, coefficients, matrix(out))
        return out
    vectors = [unpack(*one, base.shape) for one in zip(values, scales, groups)]
    return merge_weights_reference(base, vectors, coefficients.tolist()).to(base.dtype, copy=True)


@merged_weight.register_fake
def _(base: Any, values: Any, scales: Any, groups: Any, coefficients: Any) -> Any:
    return torch.empty_like(base)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, scales, groups, coefficients = inputs
    ctx.save_for_backward(*values, *scales)
    ctx.groups, ctx.dtype = groups, coefficients.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    from scalemerge.kernels.coefficient_grad import inner_products

    experts, packed = len(ctx.groups), ctx.saved_tensors
    dc = inner_products(gradient, packed[:experts], packed[experts:], ctx.groups).to(ctx.dtype)
    return None, [None] * experts, [None] * experts, None, dc


merged_weight.register_autograd(_backward, setup_context=_save)
