"""Embeddings of all ranks, with gradients for one's own rows.

Every rank computes the loss L of the global batch, so dL/d(own rows) is complete on each rank without a backward
collective. Data parallelism averages gradients over W ranks: the loss must be multiplied by W, or the result is W times
too small. (An autograd all-gather with a mean over ranks gives the same; mixing the two is the peers' common fault.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(local: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """Concatenate rows [n_r, D] of all ranks r in rank order; counts[r] = n_r, known on all ranks."""
    longest = max(counts)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded.contiguous())
    parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    parts[rank] = local
    return torch.cat(parts)
