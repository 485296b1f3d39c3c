"""Learned coefficients as a merge: W0 + sum_i c_i T_i with the c of coefficients.json, by group of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from scalemerge.checkpoints.atomic import read_json
from scalemerge.errors import InputError
from scalemerge.kernels.merge_weights import merge_weights_reference
from scalemerge.task_vectors import GRANULARITIES, group_of


def read_coefficients(path: Path) -> dict[str, Any]:
    """coefficients.json, checked: granularity, experts, and a finite c per expert for every group."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"granularity", "experts", "c"} <= set(content):
        raise InputError(f"{path}: needs granularity, experts and c; make it with 'scalemerge position'")
    if content["granularity"] not in GRANULARITIES:
        raise InputError(f"{path}: granularity {content['granularity']!r} is not one of {', '.join(GRANULARITIES)}")
    if not isinstance(content["c"], dict) or not isinstance(content["experts"], list):
        raise InputError(f"{path}: 'experts' must be a list and 'c' a mapping; make it with 'scalemerge position'")
    for group, values in content["c"].items():
        numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not numbers or len(values) != len(content["experts"]):
            raise InputError(f"{path}: c.{group} must hold {len(content['experts'])} finite numbers, one an expert")
    return content


def combine_learned(coefficients: dict[str, Any]) -> Callable[[str, Tensor, list[Tensor]], Tensor]:
    """The function that merges a tensor at learned coefficients; tensors that no expert moved stay at the base.

    It raises InputError for a moved tensor whose group has no coefficients.
    """

    def combine(name: str, base: Tensor, task_vectors: list[Tensor]) -> Tensor:
        group = group_of(name, coefficients["granularity"])
        c = coefficients["c"].get(group)
        if c is None:
            if any(bool(task_vector.any()) for task_vector in task_vectors):
                raise InputError(
                    f"coefficients.json: no c for group '{group}', which tensor '{name}' needs; learn again"
                )
            return base
        return merge_weights_reference(base, task_vectors, c)

    return combine
