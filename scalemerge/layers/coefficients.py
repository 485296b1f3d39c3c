"""Which merging coefficients a tensor uses.

A position gives c [groups, E]; every merged tensor belongs to one group (the whole model, a transformer layer, a
module). Layers ask here for their row at each forward pass, so that one assignment moves the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Coefficients:
    """The current c [G, E] and the row of every tensor. Not a module: what is learned is the position behind it.

    by_row: for single tensors, c [E, N] of their own, one a row of the weight (an output of nn.Linear).
    """

    def __init__(self, rows: Mapping[str, int], value: Tensor, by_row: Mapping[str, Tensor] | None = None) -> None:
        self.rows = dict(rows)
        self.by_row = dict(by_row or {})
        self.moves = 0
        self.set(value)

    def set(self, value: Tensor) -> None:
        """Move the model. value: [G, E], float32 or float64; gradients flow to it."""
        if value.dim() != 2:
            raise ValueError(f"coefficients must be [groups, experts], not {tuple(value.shape)}")
        self.value = value
        self.moves += 1

    def of(self, name: str) -> Tensor:
        """The coefficients of a tensor: [E], or [E, N] where it has them by row."""
        if name in self.by_row:
            return self.by_row[name]
        return self.value[self.rows[name]]

    def alias(self, name: str, other: str) -> None:
        """Let `other`, a second name of a tied tensor, have the coefficients of `name`."""
        if name in self.rows:
            self.rows[other] = self.rows[name]
        if name in self.by_row:
            self.by_row[other] = self.by_row[name]

    def stamp(self, name: str) -> tuple[int, int]:
        """Changes whenever the tensor's coefficients do, in place too."""
        return self.moves, self.of(name)._version

    @classmethod
    def uniform(cls, names: Iterable[str], value: Tensor) -> Coefficients:
        """One set of coefficients [E] for all tensors."""
        return cls(dict.fromkeys(names, 0), torch.atleast_2d(value))
