"""Task vectors as they lie in memory: dense, int8 or int4 with group scales, or low-rank. One layer may mix them.

    dense       a tensor [N, K], float32, bfloat16, float16 (or float64: reference only)
    Quantized   T = values * scale, symmetric, one bfloat16 scale for each group of `group_size` columns of a row.
                int8: values in -127..127. int4: values in -7..7, two to a byte, column 2j in the low nibble of byte j,
                stored plus 8. With groups of 64: 0.51 (int8) and 0.27 (int4) of the bytes of bfloat16.
    LowRank     T = B A, never multiplied out: 2 R (N + K) FLOPs a row instead of merging N K numbers.

Scales are bfloat16, not float16, because those of task vectors (1e-5 and smaller) are subnormal there. The scale is
rounded first and the values are rounded against it, so its own rounding costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INT4_ZERO = 8
GROUP_SIZES = (32, 64, 128, 256)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Quantized:
    """values: int8 [N, K] or packed uint8 [N, ceil(K / 2)]; scales: [N, ceil(K / group_size)]; shape: (N, K)."""

    values: Tensor
    scales: Tensor
    group_size: int
    shape: torch.Size

    @property
    def bits(self) -> int:
        return 4 if self.values.dtype == torch.uint8 else 8

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> Quantized:
        return Quantized(self.values.to(device), self.scales.to(device), self.group_size, self.shape)


@dataclass(frozen=True)
class LowRank:
    """T = b @ a; a: [R, K]; b: [N, R], any scaling (LoRA's alpha / r) already in b."""

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"a low-rank task vector needs a [R, K] and b [N, R], not {list(self.a.shape)} and {list(self.b.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def to(self, device: torch.device) -> LowRank:
        return LowRank(self.a.to(device), self.b.to(device))


TaskVector = Tensor | Quantized | LowRank


def quantize(task_vector: Tensor, bits: int, group_size: int = 64) -> Quantized:
    """Round a dense task vector [N, K] to int8 or int4 with a scale a group of columns.

    Raises ValueError for other bits, other group sizes, or another number of dimensions.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, not {group_size}")
    if task_vector.dim() != 2:
        raise ValueError(f"only matrices are quantized, not shape {list(task_vector.shape)}; keep it dense")
    columns = task_vector.shape[1]
    limit = 127 if bits == 8 else 7
    padding = -columns % group_size
    grouped = torch.nn.functional.pad(task_vector.float(), (0, padding)).unflatten(1, (-1, group_size))
    scales = (grouped.abs().amax(2) / limit).to(torch.bfloat16)
    divisor = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(2)
    values = (grouped / divisor).round().clamp(-limit, limit).flatten(1)[:, :columns].to(torch.int8)
    if bits == 4:
        even = torch.nn.functional.pad(values, (0, columns % 2)).to(torch.int16) + INT4_ZERO
        values = (even[:, 0::2] | (even[:, 1::2] << 4)).to(torch.uint8)
    return Quantized(values.contiguous(), scales, group_size, task_vector.shape)


def dense_block(
    task_vector: TaskVector,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """T[rows, columns] as numbers. A dense one is a view in its own dtype; others are made in `dtype` (or into `out`).

    rows, columns: (start, stop), all by default.
    """
    if isinstance(task_vector, Tensor):
        part = task_vector if rows is None else task_vector[rows[0] : rows[1]]
        return part if columns is None else part[:, columns[0] : columns[1]]
    r0, r1 = rows or (0, task_vector.shape[0])
    c0, c1 = columns or (0, task_vector.shape[1])
    if isinstance(task_vector, LowRank):
        product = task_vector.b[r0:r1].to(dtype) @ task_vector.a[:, c0:c1].to(dtype)
        return product if out is None else out.copy_(product)
    out = torch.empty(r1 - r0, c1 - c0, dtype=dtype, device=task_vector.values.device) if out is None else out
    return dequantize_into(out, task_vector.values[r0:r1], task_vector.scales[r0:r1], task_vector.group_size, c0)


def dequantize_into(out: Tensor, values: Tensor, scales: Tensor, group_size: int, first_column: int = 0) -> Tensor:
    """Columns [first_column, first_column + width of out) of some rows, multiplied by their scales, into `out`."""
    c0, c1 = first_column, first_column + out.shape[1]
    if values.dtype == torch.uint8:
        bits = out.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()])  # so that no copy is made
        for parity in (0, 1):
            wanted = bits[:, (parity - c0) % 2 :: 2]
            start = c0 + (parity - c0) % 2
            wanted.copy_(values[:, start // 2 : start // 2 + wanted.shape[1]])
            _ = wanted.bitwise_right_shift_(4) if parity else wanted.bitwise_and_(15)
        out.copy_(bits).sub_(INT4_ZERO)
    else:
        out.copy_(values[:, c0:c1])
    aligned = c1 // group_size * group_size
    if c0 % group_size == 0 and aligned > c0 and out.is_contiguous():
        whole = out[:, : aligned - c0].unflatten(1, (-1, group_size))
        whole.mul_(scales[:, c0 // group_size : aligned // group_size].unsqueeze(2))
        start = aligned
    else:
        start = c0
    while start < c1:  # what does not fill a group, column range by column range
        stop = min(c1, (start // group_size + 1) * group_size)
        out[:, start - c0 : stop - c0].mul_(scales[:, start // group_size].unsqueeze(1))
        start = stop
    return out


@dataclass(frozen=True)
class Packed:
    """The task vectors of one weight, sorted by how they are computed with.

    merged: positions (among the E) of the dense and quantized ones, whose `values`, `scales` (an empty tensor for a
    dense one) and `groups` (0 for a dense one) follow. low_rank: positions of the others, one for each of the R rows of
    the concatenated `a` [R, K] and columns of `b` [N, R].
    """

    shape: torch.Size
    experts: int
    merged: tuple[int, ...]
    values: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    groups: tuple[int, ...]
    low_rank: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @classmethod
    def of(cls, task_vectors: Sequence[TaskVector]) -> Packed:
        shape = task_vectors[0].shape
        for vector in task_vectors:
            if vector.shape != shape:
                raise ValueError(f"a task vector has shape {list(vector.shape)}, another one {list(shape)}")
        merged, values, scales, groups = [], [], [], []
        for i, vector in enumerate(task_vectors):
            if isinstance(vector, LowRank):
                continue
            if isinstance(vector, Tensor) and not vector.is_floating_point():
                raise ValueError(f"a dense task vector must be floating point, not {vector.dtype}")
            merged.append(i)
            values.append(vector if isinstance(vector, Tensor) else vector.values)
            scales.append(vector.new_empty(0) if isinstance(vector, Tensor) else vector.scales)
            groups.append(0 if isinstance(vector, Tensor) else vector.group_size)
        low = [(i, vector) for i, vector in enumerate(task_vectors) if isinstance(vector, LowRank)]
        low_rank = a = b = None
        if low:
            positions = [i for i, vector in low for _ in range(vector.a.shape[0])]
            low_rank = torch.tensor(positions, device=low[0][1].a.device)
            a = torch.cat([vector.a for _, vector in low])
            b = torch.cat([vector.b for _, vector in low], dim=1).contiguous()
        lists = tuple(values), tuple(scales), tuple(groups)
        return cls(shape, len(task_vectors), tuple(merged), *lists, low_rank, a, b)

    @classmethod
    def of_none(cls, shape: torch.Size) -> Packed:
        """No task vectors at all: the base weight alone."""
        return cls(shape, 0, (), (), (), (), None, None, None)

    @property  # functools.cached_property takes a lock, which torch.compile cannot trace
    def all_merged(self) -> bool:
        """Whether no task vector is low-rank, so that c is used as it is."""
        return len(self.merged) == self.experts

    @property
    def nbytes(self) -> int:
        parts = [*self.values, *self.scales, *(tensor for tensor in (self.a, self.b) if tensor is not None)]
        return sum(tensor.nbytes for tensor in parts)


def unpack(values: Tensor, scales: Tensor, group_size: int, shape: Sequence[int]) -> TaskVector:
    """The task vector behind one entry of Packed's three lists, for weights of `shape`."""
    return Quantized(values, scales, group_size, torch.Size(shape)) if group_size else values
