"""The product with a merged weight, y = x W(c)' (or x W(c)), as one differentiable op; which strategy it takes.

    forward      y  = x W(c)' + b
    backward     dX = dY W(c),   dc = <dY' x, T_i>   (x alone is saved)

Both are cut along what they produce: rows of W in forward, columns in backward. So every output is summed by one
product and rounded once, and W0 and T_i of a block are read for dX and again, from cache, for dc. W [N, K] lies as
nn.Linear keeps it; with along_rows=False the roles of rows and columns change places, which serves GPT-2's Conv1D.

    on_the_fly   few rows of x on a GPU: tiles are merged in registers (kernels/merged_linear.py)
    chunked      blocks are merged into a reused buffer and multiplied by the vendor's library. On a GPU there are two
                 buffers: the next block is merged on a side stream while the present one is multiplied
    auto         on_the_fly up to kernels.tuning.few_rows, else chunked

Memory beyond W0, T_i and activations: two chunks. FLOPs: 2 + 2 + 2 MNK, or 2 + 2 + 2/s with one in s rows sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scalemerge.kernels import tuning
from scalemerge.kernels.coefficient_grad import coefficient_grad
from scalemerge.kernels.formats import accumulation_dtype
from scalemerge.kernels.merge_weights import DEQUANTIZED, merge_weights
from scalemerge.kernels.merged_linear import merged_linear_triton
from scalemerge.kernels.tiles import use_triton
from scalemerge.kernels.workspace import workspace

Strategy = Literal["auto", "on_the_fly", "chunked"]
STRATEGIES = ("auto", "on_the_fly", "chunked")

_MERGED, _MERGED_TOO = 0, 2  # workspace slots; the second is for a GPU
_ALIGNMENT = 256  # blocks of columns start at multiples of every quantization group, narrow ones of their own width
_LEAST_COLUMNS = 16


def choose(strategy: str, rows: int, x: Tensor) -> str:
    """The strategy that runs. Raises ValueError for on_the_fly where there is no GPU, and for unknown names."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if strategy == "on_the_fly" and not use_triton(x):
        raise ValueError("strategy='on_the_fly' needs a GPU, triton and a dtype other than float64; use 'auto'")
    if strategy == "auto":
        return "on_the_fly" if use_triton(x) and rows <= tuning.few_rows(x.device) else "chunked"
    return strategy


def blocks(shape: Sequence[int], along_rows: bool, dtype: torch.dtype, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (or of columns) of a weight that fill `chunk_bytes` in the dtype they are merged in.

    At least one row or 16 columns: narrower tiles would be no matrix product.
    """
    count, width = shape if along_rows else (shape[1], shape[0])
    step = max(1, chunk_bytes // max(1, width * dtype.itemsize))
    if not along_rows and step < count:
        unit = min(_ALIGNMENT, max(_LEAST_COLUMNS, 1 << (step.bit_length() - 1)))
        step = max(unit, step // unit * unit)
    for start in range(0, count, step):
        yield start, min(count, start + step)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """What a block is merged in: Triton sums in registers, the reference in the buffer."""
    return x.dtype if use_triton(x) else accumulation_dtype(x.dtype)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Weights(NamedTuple):
    """What is merged, as the kernels read it. base: None where the delta alone is wanted."""

    base: Tensor | None
    values: Sequence[Tensor]
    scales: Sequence[Tensor]
    groups: Sequence[int]
    coefficients: Tensor
    shape: Sequence[int]


class _MergedBlocks:
    """Iterates over (start, stop, W(c) block in x's dtype); on a GPU merges one block ahead on a side stream."""

    def __init__(self, weights: _Weights, along_rows: bool, x: Tensor, chunk_bytes: int) -> None:
        self._weights, self._along_rows, self._shape = weights, along_rows, weights.shape
        self._dtype, self._device, self._on_gpu = x.dtype, x.device, use_triton(x)
        self._sum_dtype = _sum_dtype(x)
        self.ranges = list(blocks(weights.shape, along_rows, self._sum_dtype, chunk_bytes))

    def _place(self, start: int, stop: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of a block."""
        if self._along_rows:
            return (start, stop), (0, self._shape[1])
        return (0, self._shape[0]), (start, stop)

    def _buffer(self, start: int, stop: int, slot: int) -> Tensor:
        rows, columns = self._place(start, stop)
        size = (rows[1] - rows[0], columns[1] - columns[0])
        return workspace(slot, size, self._sum_dtype, self._device)

    def _one_by_one(self) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in self.ranges:
            merged = merge_weights(*self._weights, *self._place(start, stop), self._buffer(start, stop, _MERGED))
            if self._sum_dtype != self._dtype:
                merged = workspace(DEQUANTIZED, merged.shape, self._dtype, self._device).copy_(merged)
            yield start, stop, merged

    def _one_ahead(self) -> Iterator[tuple[int, int, Tensor]]:
        main, side = torch.cuda.current_stream(self._device), _side_stream(self._device)
        side.wait_stream(main)
        ready: list[tuple[Tensor, torch.cuda.Event]] = []
        used: list[torch.cuda.Event] = []
        for number in range(len(self.ranges) + 1):
            if number < len(self.ranges):
                start, stop = self.ranges[number]
                buffer = self._buffer(start, stop, _MERGED if number % 2 else _MERGED_TOO)  # the main stream's
                with torch.cuda.stream(side):
                    if number >= 2:
                        side.wait_event(used[number - 2])
                    merged = merge_weights(*self._weights, *self._place(start, stop), buffer)
                    ready.append((merged, side.record_event()))
            if number:
                merged, event = ready[number - 1]
                main.wait_event(event)
                yield *self.ranges[number - 1], merged
                used.append(main.record_event())

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        ahead = self._on_gpu and len(self.ranges) > 1
        return self._one_ahead() if ahead else self._one_by_one()


def _few_rows(x: Tensor, weights: _Weights, bias: Tensor | None, along_rows: bool) -> Tensor:
    """The on_the_fly strategy."""
    base, values, scales, groups, c, shape = weights
    return merged_linear_triton(
        x.contiguous(), base, values, scales, groups, c, bias, shape=shape, along_rows=along_rows
    )


def _add_product(y: Tensor, x: Tensor, base: Tensor, along_rows: bool, chunk_bytes: int) -> Tensor:
    """y += x W0' (or x W0), in place; W0 of another dtype is cast a block at a time."""
    whole = 2**62 if base.dtype == x.dtype else chunk_bytes
    for start, stop in blocks(base.shape, along_rows, _sum_dtype(x), whole):  # of the size of the blocks of the delta
        block = base[start:stop] if along_rows else base[:, start:stop]
        if base.dtype != x.dtype:
            block = workspace(DEQUANTIZED, block.shape, x.dtype, x.device).copy_(block)
        y[:, start:stop].addmm_(x, block.T if along_rows else block)
    return y


def _autocast_off(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op("scalemerge::merged_product", mutates_args=())
def merged_product(
    x: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    base: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    sample: Tensor | None,
    cached: Tensor | None,
    along_rows: bool,
    split: bool,
    strategy: str,
    chunk_bytes: int,
) -> Tensor:
    """y = x W(c)' + bias (along_rows) or x W(c) + bias; see the top of this file.

    x: [M, K] (or [M, N]); coefficients: [E] or [E, N], one a row of W; bias: [outputs]; base: [N, K]; values, scales,
    groups: the task vectors as kernels.formats.Packed has them, possibly none; sample: rows of x [m] that dc is
    estimated from, all when None; cached: W(c) whole [N, K], used instead of merging; split: W0 and the delta in two
    products. Returns [M, outputs] in x's dtype.
    """
    with _autocast_off(x):
        outputs = base.shape[0 if along_rows else 1]
        bias = None if bias is None else bias.to(x.dtype)
        y = x.new_empty(len(x), outputs)
        if not values:
            return _add_product(y.copy_(bias) if bias is not None else y.zero_(), x, base, along_rows, chunk_bytes)
        weights = _Weights(None if split else base, values, scales, groups, coefficients, base.shape)
        if cached is None and choose(strategy, len(x), x) == "on_the_fly":
            y = _few_rows(x, weights, bias, along_rows)
        else:
            merged = _MergedBlocks(weights, along_rows, x, chunk_bytes)
            for start, stop, weight in merged if cached is None else [(0, outputs, cached)]:
                factor = weight.T if along_rows else weight
                if bias is None:
                    torch.mm(x, factor, out=y[:, start:stop])
                else:
                    torch.addmm(bias[start:stop], x, factor, out=y[:, start:stop])
        return _add_product(y, x, base, along_rows, chunk_bytes) if split else y


@merged_product.register_fake
def _(x: Tensor, coefficients: Any, bias: Any, base: Tensor, *rest: Any) -> Tensor:
    along_rows = rest[5]
    return x.new_empty(x.shape[0], base.shape[0 if along_rows else 1])


@torch.library.custom_op("scalemerge::merged_product_backward", mutates_args=())
def merged_product_backward(
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    base: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    sample: Tensor | None,
    cached: Tensor | None,
    along_rows: bool,
    split: bool,
    strategy: str,
    chunk_bytes: int,
    need_x: bool,
    need_c: bool,
) -> tuple[Tensor, Tensor]:
    """(dX [M, inputs], dc float64 like c); dX comes back empty where not needed. x: the rows that dc is made from."""
    with _autocast_off(dy):
        inputs = base.shape[1 if along_rows else 0]
        dx = dy.new_empty(len(dy), inputs) if need_x else dy.new_empty(0, inputs)
        per_row = coefficients.dim() == 2
        dc = torch.zeros(coefficients.shape, dtype=torch.float64, device=dy.device)
        picked = dy if sample is None else dy[sample]

        def add_to_dc(start: int, stop: int) -> None:
            whole, part = (0, base.shape[0 if along_rows else 1]), x[:, start:stop]
            left, right = (picked, part) if along_rows else (part, picked)
            rows, columns = (whole, (start, stop)) if along_rows else ((start, stop), whole)
            block = dc[:, slice(*rows)] if per_row else dc
            block.add_(coefficient_grad(left, right, values, scales, groups, base.shape, *rows, *columns, per_row))

        if not values:
            return (_add_product(dx.zero_(), dy, base, not along_rows, chunk_bytes) if need_x else dx), dc
        weights = _Weights(None if split else base, values, scales, groups, coefficients, base.shape)
        merged = _MergedBlocks(weights, not along_rows, dy, chunk_bytes)
        together = False
        if need_x and cached is not None:
            torch.mm(dy, cached if along_rows else cached.T, out=dx)
        elif need_x and choose(strategy, len(dy), dy) == "on_the_fly":
            dx = _few_rows(dy, weights, None, not along_rows)
        elif need_x:
            together = need_c
            for start, stop, weight in merged:
                torch.mm(dy, weight if along_rows else weight.T, out=dx[:, start:stop])
                if need_c:
                    add_to_dc(start, stop)
        if need_c and not together:
            for start, stop in merged.ranges if not use_triton(dy) else [(0, inputs)]:
                add_to_dc(start, stop)
        if need_x and split:
            _add_product(dx, dy, base, not along_rows, chunk_bytes)
        return dx, dc


@merged_product_backward.register_fake
def _(dy: Tensor, x: Tensor, coefficients: Tensor, base: Tensor, values: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    along_rows, need_x = rest[4], rest[8]
    inputs = base.shape[1 if along_rows else 0]
    return dy.new_empty(dy.shape[0] if need_x else 0, inputs), coefficients.new_empty(
        coefficients.shape, dtype=torch.float64
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefficients, _, base, values, scales, groups, sample, cached, along_rows, split, strategy, chunk = inputs
    needed = x if sample is None else x[sample]
    if not values or not ctx.needs_input_grad[1]:
        needed = x.new_empty(0, x.shape[1])
    ctx.save_for_backward(needed, coefficients, base, sample, cached, *values, *scales)
    ctx.settings = (groups, along_rows, split, strategy, chunk)
    ctx.rows = x.shape[0]


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, coefficients, base, sample, cached, *packed = ctx.saved_tensors
    groups, along_rows, split, strategy, chunk_bytes = ctx.settings
    values, scales = packed[: len(groups)], packed[len(groups) :]
    need_x, need_c, need_bias = ctx.needs_input_grad[:3]
    dy = dy.to(x.dtype).contiguous()
    settings = (along_rows, split, strategy, chunk_bytes, need_x, need_c)
    dx, dc = merged_product_backward(dy, x, coefficients, base, values, scales, groups, sample, cached, *settings)
    if sample is not None:
        dc = dc * (ctx.rows / sample.shape[0])
    nothing = [None] * len(groups)
    return (
        dx if need_x else None,
        dc.to(coefficients.dtype) if need_c else None,
        dy.sum(0, dtype=accumulation_dtype(dy.dtype)) if need_bias else None,
        None,
        nothing,
        nothing,
        None if nothing else [],  # what torch takes an empty list of numbers for
        *[None] * 6,
    )  # fmt: skip


merged_product.register_autograd(_backward, setup_context=_save)
