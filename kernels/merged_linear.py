"""y = x W(c)' or y = x W(c) for few rows of x, with the weight merged on the fly.

For up to about 256 rows a product is bound by reading weights, so each tile of W0 + sum_i c_i T_i is made in registers,
rounded once to x's dtype as an exported model's would be, and fed to the matrix unit at once: E + 1 weights are read,
nothing is written but y. With more rows every row tile would merge the weights again; there the chunked strategy of
scalemerge.layers.product is the way.

    along rows (nn.Linear)     y[m, n] = sum_k x[m, k] W[n, k]
    along columns (Conv1D, or dX of nn.Linear)     y[m, k] = sum_n x[m, n] W[n, k]

Along rows the merged tile is the left operand of the dot, so that it stays in registers: y' = W x'. Along columns it is
the right one, y = x W: a transposed left operand has each thread read columns of W, which spills on sm_100. The
contraction is cut into parts where there are too few tiles to fill the device; the parts are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalemerge.kernels.formats import accumulation_dtype, unpack
from scalemerge.kernels.merge_weights import merge_weights_reference
from scalemerge.kernels.tiles import (
    coefficient_rows,
    dot_dtype,
    jit,
    kinds_of,
    merged_tile,
    require_rows,
    strides_of,
    tl,
    triton,
)
from scalemerge.kernels.tuning import capability, few_rows_tile, smallest_group, splits


@jit
def _merged_linear_kernel(
    out,
    x,
    bias,
    base,
    values,
    scales,
    coefficients,
    row_count,
    output_count,
    length,
    x_stride,
    base_stride,
    value_strides,
    scale_strides,
    KINDS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    COEFFICIENT_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[part, m, o]: part `program_id(1)` of the contraction for one tile of outputs and one of rows."""
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    part = tl.program_id(1)
    rows = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < row_count
    output_mask = outputs < output_count
    total = tl.zeros((BLOCK_OUT, BLOCK_M) if ALONG_ROWS else (BLOCK_M, BLOCK_OUT), tl.float32)
    for step in range(part, tl.cdiv(length, BLOCK_IN), SPLITS):
        start = step * BLOCK_IN
        inner = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
        inner_mask = inner < length
        x_tile = tl.load(
            x + rows[:, None] * x_stride + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0
        ).to(DOT_DTYPE)
        weight = merged_tile(
            base,
            values,
            scales,
            coefficients,
            base_stride,
            value_strides,
            scale_strides,
            (outputs if ALONG_ROWS else inner)[:, None],
            (output_mask if ALONG_ROWS else inner_mask)[:, None],
            start.to(tl.int64) if ALONG_ROWS else tl.program_id(0).to(tl.int64) * BLOCK_OUT,
            length if ALONG_ROWS else output_count,
            KINDS,
            GROUPS,
            BLOCK_IN if ALONG_ROWS else BLOCK_OUT,
            HAS_BASE,
            COEFFICIENT_ROWS,
        )
        weight = weight.to(DOT_DTYPE)  # rounded once, to the dtype of x
        if ALONG_ROWS:
            total = tl.dot(weight, tl.trans(x_tile), total, input_precision=PRECISION)
        else:
            total = tl.dot(x_tile, weight, total, input_precision=PRECISION)
    if not ALONG_ROWS:
        total = tl.trans(total)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=output_mask, other=0.0).to(tl.float32)[:, None]
    place = (part.to(tl.int64) * row_count + rows[None, :]) * output_count + outputs[:, None]
    tl.store(out + place, total, mask=output_mask[:, None] & row_mask[None, :])


def merged_linear_triton(
    x: Tensor,
    base: Tensor | None,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    along_rows: bool = True,
    parts: int | None = None,
) -> Tensor:
    """x [M, K] -> [M, N] (along_rows, W [N, K]) or x [M, N] -> [M, K], in x's dtype; float32 sums.

    base: [N, K], or None for the delta alone; coefficients: [E] (or [E, N], one a row); bias: [outputs] or
    None; shape: (N, K). parts: into how many the contraction is cut; chosen when not given.
    """
    require_rows(x, *values, *scales, *([] if base is None else [base]))
    outputs, length = shape if along_rows else (shape[1], shape[0])
    if not x.shape[0] or not outputs:
        return x.new_zeros(x.shape[0], outputs)
    tile = few_rows_tile(
        x.shape[0],
        outputs,
        len(values),
        max(2, x.element_size(), 0 if base is None else base.element_size()),
        smallest_group(groups),
        capability(x.device),
        along_rows=along_rows,
    )
    width, inner = (tile.rows, tile.columns) if along_rows else (tile.columns, tile.rows)
    across, row_tiles = triton.cdiv(outputs, width), triton.cdiv(x.shape[0], tile.depth)
    parts = parts or splits(across * row_tiles, length, inner, x.device)
    whole = parts == 1
    out = torch.empty(parts, x.shape[0], outputs, dtype=x.dtype if whole else torch.float32, device=x.device)
    _merged_linear_kernel[(across, parts, row_tiles)](
        out,
        x,
        out if bias is None else bias,
        out if base is None else base,
        tuple(values),
        tuple(scales),
        coefficients.float().contiguous(),
        x.shape[0],
        outputs,
        length,
        x.stride(0),
        0 if base is None else base.stride(0),
        strides_of(values),
        strides_of(scales),
        KINDS=kinds_of(values, groups),
        GROUPS=tuple(groups),
        HAS_BASE=base is not None,
        COEFFICIENT_ROWS=coefficient_rows(coefficients),
        HAS_BIAS=bias is not None and whole,
        ALONG_ROWS=along_rows,
        SPLITS=parts,
        BLOCK_M=tile.depth,
        BLOCK_OUT=width,
        BLOCK_IN=inner,
        DOT_DTYPE=dot_dtype(x.dtype),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if whole:
        return out[0]
    total = out.sum(0)
    return (total if bias is None else total.add_(bias)).to(x.dtype)


def merged_linear_reference(
    x: Tensor,
    base: Tensor | None,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    along_rows: bool = True,
) -> Tensor:
    """The same in plain torch with the merged weight made whole: what tests compare with. shape: (N, K)."""
    dtype = accumulation_dtype(x.dtype)
    vectors = [unpack(*one, shape) for one in zip(values, scales, groups)]
    c = list(coefficients.unsqueeze(2)) if coefficients.dim() == 2 else coefficients.tolist()
    out = torch.empty(*shape, dtype=dtype, device=x.device)
    weight = merge_weights_reference(base, vectors, c, out=out)
    weight = weight.to(x.dtype)
    y = x @ (weight.T if along_rows else weight)
    return y if bias is None else y + bias.to(y.dtype)
