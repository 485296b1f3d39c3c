"""What differs between two models A and B, module by module. With D = B - A, over the tensors that both have:

    norms             |A|, |B|, |D|              Frobenius norms
    relative norm     |D| / |A|
    cosine            <A, B> / (|A| |B|)         of the weights
    delta survival    <D', D> / |D|^2            D' = round(B) - round(A): what is left of D when models are stored in
                                                 bfloat16 or float16, along D; 1 where nothing is lost, or nothing was
                                                 there

Tensors go through in blocks of rows, and every byte is read once; sums are made in float64. Names are those of the
backbones (see Checkpoint), so a model with a head and one without compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalemerge.checkpoints.reader import Checkpoint
from scalemerge.encoder import local_folder
from scalemerge.errors import InputError
from scalemerge.task_vectors.groups import GRANULARITIES, group_of

STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCK_BYTES = 8 * 2**20
_PART = 2**18  # numbers that are there in float64 at a time


@dataclass(frozen=True)
class Difference:
    """Sums over some tensors: |A|^2, |B|^2, <A, B>, |D|^2, <D', D> with D' as bfloat16 and as float16."""

    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    square: float = 0.0
    bfloat16: float = 0.0
    float16: float = 0.0
    numbers: int = 0

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Difference:
        """The sums of two tensors of one shape, or of some rows of them."""
        total = torch.zeros(6, dtype=torch.float64)
        for first, second in zip(a.flatten().split(_PART), b.flatten().split(_PART), strict=True):
            x, y = first.double(), second.double()
            d = y - x
            kept = [second.to(dtype).double() - first.to(dtype).double() for dtype in STORED.values()]
            pairs = ((x, x), (y, y), (x, y), (d, d), *((each, d) for each in kept))
            total += torch.stack([torch.dot(*pair) for pair in pairs])
        names = ("a", "b", "product", "square", *STORED)
        return cls(**dict(zip(names, total.tolist(), strict=True)), numbers=a.numel())

    def __add__(self, other: Difference) -> Difference:
        return Difference(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    @property
    def relative_norm(self) -> float:
        return math.sqrt(self.square / self.a) if self.a else (math.inf if self.square else 0.0)

    @property
    def cosine(self) -> float:
        lengths = math.sqrt(self.a) * math.sqrt(self.b)
        return self.product / lengths if lengths else float(self.a == self.b)

    def survival(self, dtype: str) -> float:
        """The share of D that storage in a dtype of STORED keeps, at most 1 (rounding up can make it a little more)."""
        return min(1.0, getattr(self, dtype) / self.square) if self.square else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "numbers": self.numbers,
            "norm_a": math.sqrt(self.a),
            "norm_b": math.sqrt(self.b),
            "norm_delta": math.sqrt(self.square),
            "relative_norm": None if math.isinf(self.relative_norm) else self.relative_norm,
            "cosine": self.cosine,
            "survival": {dtype: self.survival(dtype) for dtype in STORED},
        }


@dataclass(frozen=True)
class Differences:
    """The differences of two folders. modules: by group of tensors, in the order of their names. only_a, only_b: names
    of tensors that the other lacks. shapes: of tensors with two shapes, which are not compared. integers: names of
    integer tensors whose values differ."""

    a: Path
    b: Path
    granularity: str
    modules: dict[str, Difference]
    only_a: list[str]
    only_b: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    integers: list[str]

    @property
    def total(self) -> Difference:
        return sum(self.modules.values(), Difference())

    def as_dict(self) -> dict[str, Any]:
        return {
            "a": str(self.a),
            "b": str(self.b),
            "granularity": self.granularity,
            "total": self.total.as_dict(),
            "modules": {name: each.as_dict() for name, each in self.modules.items()},
            "only_a": self.only_a,
            "only_b": self.only_b,
            "shapes": {name: [list(shape) for shape in pair] for name, pair in self.shapes.items()},
            "integers": self.integers,
        }


def diff_folders(
    a: str | Path,
    b: str | Path,
    *,
    granularity: str = "module",
    progress: Callable[[int], None] | None = None,
) -> Differences:
    """Compare two whole models (folders or hub ids). granularity: module, layer or global. progress is called with the
    bytes read. Raises InputError for folders that are no whole models, models without a common tensor, NaN or infinity.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"--granularity {granularity}: choose one of {', '.join(GRANULARITIES)}")
    first, second = _open(a), _open(b)
    common = [name for name in first.names if name in second.specs]
    if not common:
        raise InputError(f"{second.folder}: has no tensor name in common with {first.folder}; compare like models")
    shapes = {
        name: (first.specs[name].shape, second.specs[name].shape)
        for name in common
        if first.specs[name].shape != second.specs[name].shape
    }
    modules: dict[str, Difference] = {}
    integers = []
    for name in common:
        if name in shapes:
            continue
        if not (first.specs[name].dtype.is_floating_point and second.specs[name].dtype.is_floating_point):
            if not torch.equal(first.read(name), second.read(name)):
                integers.append(name)
            continue
        group = group_of(name, granularity)
        for rows in _blocks(first, name):
            x, y = (_finite(checkpoint, name, rows) for checkpoint in (first, second))
            modules[group] = modules.get(group, Difference()) + Difference.of(x, y)
            if progress:
                progress(x.nbytes + y.nbytes)
    return Differences(
        first.folder,
        second.folder,
        granularity,
        modules,
        [name for name in first.names if name not in second.specs],
        [name for name in second.names if name not in first.specs],
        shapes,
        integers,
    )


def _open(path: str | Path) -> Checkpoint:
    folder = Path(path) if Path(path).is_dir() else Path(local_folder(path))
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: no config.json, so no whole model; merge it first, or see 'scalemerge inspect {folder} --base'"
        )
    return Checkpoint(folder)


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, int] | None]:
    spec = checkpoint.specs[name]
    if not spec.shape:
        yield None
        return
    step = max(1, _BLOCK_BYTES // max(1, spec.numel * 4 // max(1, spec.shape[0])))
    for start in range(0, spec.shape[0], step):
        yield start, min(spec.shape[0], start + step)


def _finite(checkpoint: Checkpoint, name: str, rows: tuple[int, int] | None) -> Tensor:
    return checkpoint.require_finite(name, checkpoint.read(name) if rows is None else checkpoint.read_rows(name, *rows))
