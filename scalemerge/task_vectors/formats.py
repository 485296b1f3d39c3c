"""Formats of task vectors, in memory and in stores on disk: less memory for a stated error.

float32, bfloat16     dense
int8, int4            matrices in groups of columns with a scale each (kernels.formats); vectors stay float32
svd                   matrices as the nearest product B A of rank r, in bfloat16; vectors are bfloat16. Stores only
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from scalemerge.kernels.formats import LowRank, TaskVector, dense_block, quantize

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT_GROUP_SIZE = 64
_CLIPS = tuple(1 - step / 32 for step in range(12))  # of a group's largest number, to try as its int4 limit


def compress(
    task_vector: Tensor, form: Format, group_size: int = DEFAULT_GROUP_SIZE, *, fit: bool = False
) -> TaskVector:
    """A task vector in a format. task_vector: float32, any shape; group_size: of int8 and int4.

    fit: choose int4 scales by the squared error of their group (see `clipped`), at twelve times the work. Raises
    ValueError for an unknown format.
    """
    if form not in FORMATS:
        raise ValueError(f"task vectors are held as one of {', '.join(FORMATS)}, not {form!r}")
    if form == "bfloat16":
        return task_vector.to(torch.bfloat16)
    if form == "float32" or task_vector.dim() != 2:
        return task_vector
    if form == "int4" and fit:
        task_vector = clipped(task_vector, group_size)
    return quantize(task_vector, 8 if form == "int8" else 4, group_size)


def decompressed(task_vector: Tensor, form: Format) -> Tensor:
    """What remains of a float32 task vector after `compress`: float32, the same shape. Rows are independent."""
    return dense_block(compress(task_vector, form)).to(torch.float32)


def clipped(task_vector: Tensor, group_size: int) -> Tensor:
    """A matrix [N, K] with the largest numbers of each group cut to the limit that serves int4 best; float32.

    quantize makes a scale of a group's largest number. Fifteen levels are few: a smaller limit rounds the bulk finer
    and loses a little on the largest. Of twelve limits each group takes the one with the least squared error.
    """
    rows, columns = task_vector.shape
    groups = -(-columns // group_size)
    padded = torch.nn.functional.pad(task_vector.float(), (0, -columns % group_size))
    grouped = padded.view(rows, groups, group_size)
    largest = grouped.abs().amax(2, keepdim=True)
    best = torch.full_like(largest, float("inf"))
    limits = largest.clone()
    for clip in _CLIPS:
        scale = (clip * largest / 7).to(torch.bfloat16).float()
        divisor = scale.masked_fill(scale == 0, 1.0)
        rounded = (grouped / divisor).round_().clamp_(-7, 7).mul_(scale)
        error = rounded.sub_(grouped).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        limits = torch.where(better, clip * largest, limits)
    return torch.minimum(torch.maximum(grouped, -limits), limits).flatten(1)[:, :columns]


def low_rank(task_vector: Tensor, rank: int) -> LowRank:
    """The product B A of rank `rank` (at most) nearest to a matrix [N, K] in the Frobenius norm, in bfloat16.

    The singular vectors of the smaller side come from the float64 Gram matrix of that side: min(N, K)^3 FLOPs, not
    those of a whole decomposition. B is fitted to A as rounded (or A to B), so that one rounding is made good.
    """
    exact = task_vector.double()
    rank = min(rank, *exact.shape)
    wide = exact.shape[0] < exact.shape[1]
    if wide:
        exact = exact.T
    _, vectors = torch.linalg.eigh(exact.T @ exact)
    first = vectors[:, -rank:].flip(1).T.to(torch.bfloat16)
    other = exact @ torch.linalg.pinv(first.double())
    second = other.to(torch.bfloat16).contiguous()
    if wide:
        return LowRank(a=second.T.contiguous(), b=first.T.contiguous())
    return LowRank(a=first.contiguous(), b=second)
