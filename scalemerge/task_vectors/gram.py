"""The Gram matrix G_ij = <T_i, T_j>: all that positions need to know of the task vectors.

Angles and norms of any combination follow from it (cos = d'G e_i / sqrt(d'Gd G_ii)), so placing a model costs E x E
arithmetic. It is made in one streaming pass over the checkpoints, a Gram matrix per tensor, with products of float32
differences accumulated in float64; a group's Gram matrix is the sum over its tensors. Cost: E^2 n FLOPs, every byte
read once, memory of one block of rows of E task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from scalemerge.task_vectors.store import TaskVectorStore


def gram_matrices(
    store: TaskVectorStore, *, progress: Callable[[int], None] | None = None, part: tuple[int, int] = (0, 1)
) -> dict[str, Tensor]:
    """The Gram matrix [E, E] float64 of each tensor. progress is called with bytes read.

    part: (i, n) reads every n-th block of rows from the i-th on; the sum over all i is the whole.
    """
    grams: dict[str, Tensor] = {}
    count, block = len(store.experts), 0
    for name in store.names:
        gram = torch.zeros(count, count, dtype=torch.float64)
        for start, stop in store.row_blocks(name):
            block += 1
            if block % part[1] != part[0]:
                continue
            rows = torch.stack([store.task_vector(i, name, start, stop).flatten() for i in range(count)]).double()
            gram += rows @ rows.T
            if progress:
                progress(rows.numel() * 4 // count * (count + 1))
        grams[name] = gram
    return grams


def group_grams(grams: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]) -> Tensor:
    """Gram matrices [groups, E, E] float64 of groups of tensors."""
    return torch.stack([torch.stack([grams[name] for name in names]).sum(0) for names in groups.values()])


def moved(grams: Mapping[str, Tensor]) -> list[str]:
    """The tensors that at least one expert changed."""
    return [name for name, gram in grams.items() if bool((gram.diagonal() > 0).any())]


def cosines(gram: Tensor) -> Tensor:
    """Gram matrices [..., E, E] as cosines; 0 where a task vector is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    outer = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return torch.where(outer > 0, gram / outer.clamp(min=torch.finfo(gram.dtype).tiny), torch.zeros_like(gram))
