"""Which merging coefficients a tensor uses.

A position gives c [groups, E]; every merged tensor belongs to one group (the whole model, a transformer layer, a
module). Layers ask here for their row at each forward pass, so that one assignment moves the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

GRANULARITIES = ("global", "layer", "module")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


def group_of(name: str, granularity: str) -> str:
    """The group that a tensor belongs to: "global", "layer.3" / "embeddings" / "other", or its module's name."""
    if granularity == "global":
        return "global"
    if granularity == "module":
        return name.rsplit(".", 1)[0]
    if granularity != "layer":
        raise ValueError(f"granularity '{granularity}' is not one of {', '.join(GRANULARITIES)}")
    found = _LAYER.search(name)
    if found:
        return f"layer.{int(found.group(1))}"
    return "embeddings" if "embed" in name else "other"


def group_names(names: Iterable[str], granularity: str) -> dict[str, list[str]]:
    """Groups in the order in which they first appear, with the tensors of each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name, granularity), []).append(name)
    return groups


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
        return cls({name: 0 for name in names}, torch.atleast_2d(value))
