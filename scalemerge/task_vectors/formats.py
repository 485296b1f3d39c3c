"""Formats that task vectors are held in while coefficients are learned: less memory for a stated error.

float32, bfloat16     dense
int8, int4            matrices in groups of 64 columns with a scale each (kernels.formats); vectors stay float32
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from scalemerge.kernels.formats import TaskVector, dense_block, quantize

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)


def compress(task_vector: Tensor, form: Format) -> TaskVector:
    """A task vector in a format. task_vector: float32, any shape. Raises ValueError for an unknown format."""
    if form not in FORMATS:
        raise ValueError(f"task vectors are held as one of {', '.join(FORMATS)}, not {form!r}")
    if form == "bfloat16":
        return task_vector.to(torch.bfloat16)
    if form == "float32" or task_vector.dim() != 2:
        return task_vector
    return quantize(task_vector, 8 if form == "int8" else 4)


def decompressed(task_vector: Tensor, form: Format) -> Tensor:
    """What remains of a float32 task vector after `compress`: float32, the same shape. Rows are independent."""
    return dense_block(compress(task_vector, form)).to(torch.float32)
