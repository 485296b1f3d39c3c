"""Which merging coefficients a tensor uses.

A position gives c [groups, E]; every merged tensor belongs to one group (the whole model, a transformer layer, a
module). Layers ask here for their row at each forward pass, so that one assignment moves the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Coefficients:
    """The current c [G, E] and the row of every tensor. Not a module: what is learned is the position behind it."""

    def __init__(self, rows: Mapping[str, int], value: Tensor) -> None:
        self.rows = dict(rows)
        self.set(value)

    def set(self, value: Tensor) -> None:
        """Move the model. value: [G, E], float32 or float64; gradients flow to it."""
        if value.dim() != 2:
            raise ValueError(f"coefficients must be [groups, experts], not {tuple(value.shape)}")
        self.value = value

    def of(self, name: str) -> Tensor:
        """The coefficients [E] of a tensor."""
        return self.value[self.rows[name]]

    @classmethod
    def uniform(cls, names: Iterable[str], value: Tensor) -> Coefficients:
        """One set of coefficients [E] for all tensors."""
        return cls(dict.fromkeys(names, 0), torch.atleast_2d(value))
