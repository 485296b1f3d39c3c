"""Merge rows of a weight: W(c) = W0 + sum_i c_i T_i, rows [start, stop), into a buffer of the caller's.

Sums are made in float32 (float64 for float64 weights) and rounded once to the buffer's dtype, because adding small
deltas one by one in bfloat16 rounds them away. Cost for n elements and E experts: 2 E n FLOPs, one read of W0 and of
every T_i, one write. This file holds the torch reference, which is what the CPU runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_weights_reference(
    base: Tensor,
    task_vectors: Iterable[Tensor],
    coefficients: Sequence[float],
    start: int = 0,
    stop: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rows [start, stop) of W0 + sum_i c_i T_i.

    base: [N, ...]; task_vectors: E tensors of the same shape (a generator is read one at a time); coefficients: E
    numbers.
    out: buffer [stop - start, ...] of the dtype wanted; made in the accumulation dtype when not given.
    """
    stop = base.shape[0] if stop is None else stop
    dtype = accumulation_dtype(base.dtype)
    rows = base[start:stop]
    direct = out is not None and out.dtype == dtype
    total = out.copy_(rows) if direct else rows.to(dtype, copy=True)  # type: ignore[union-attr]
    for coefficient, task_vector in zip(coefficients, task_vectors, strict=True):
        if coefficient != 0.0:
            total.add_(task_vector[start:stop], alpha=coefficient)
    return total if direct or out is None else out.copy_(total)
