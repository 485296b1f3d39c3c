"""Granularity: which tensors share one position (the whole model, a transformer layer, or a module)."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
