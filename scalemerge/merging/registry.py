"""The registry of static merge methods.

A method is a pure function `(base, task_vectors, *, parameters) -> merged` of one tensor; its keyword-only parameters,
with types and defaults, are the schema of the recipe and of the command line. Adding a method is adding a file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scalemerge.errors import InputError


@dataclass(frozen=True)
class MergeMethod:
    """name, where it comes from, and the function."""

    name: str
    source: str
    function: Callable[..., Tensor]

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameters and their defaults, in the names that recipes use (`lambda_` is written `lambda`)."""
        return {
            name.rstrip("_"): parameter.default
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    def check(self, parameters: dict[str, Any], where: str) -> dict[str, Any]:
        """Parameters with defaults filled in. Raises InputError for unknown names and values that are no numbers."""
        known = self.defaults
        for name, value in parameters.items():
            if name not in known:
                remedy = f"it has {', '.join(known)}" if known else "it has none"
                raise InputError(f"{where}: method '{self.name}' has no parameter '{name}'; {remedy}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{where}: '{name}' must be a finite number, not {value!r}")
        return {**known, **parameters}

    def __call__(self, base: Tensor, task_vectors: list[Tensor], parameters: dict[str, Any]) -> Tensor:
        named = {("lambda_" if name == "lambda" else name): value for name, value in parameters.items()}
        return self.function(base, task_vectors, **named)


METHODS: dict[str, MergeMethod] = {}


def merge_method(name: str, *, source: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a merge method."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METHODS[name] = MergeMethod(name, source, function)
        return function

    return register


def find_method(name: str, where: str) -> MergeMethod:
    if name not in METHODS:
        raise InputError(f"{where}: no merge method '{name}'; there are {', '.join(sorted(METHODS))}, self_positioning")
    return METHODS[name]
