"""What compression costs, module by module. With T the exact task vector and T' what is stored of it:

    relative error    |T - T'| / |T|             Frobenius norms; 0 where T is zero and stored as such
    cosine            <T, T'> / (|T| |T'|)       1 where both are zero
    weight error      |T - T'| / |W0|            what it does to the weights at c = 1: |W(1)' - W(1)| / |W0|

All follow from five sums of squares and products, in float64, which are kept for every tensor and added up over a
module, an expert, or everything.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from scalemerge.task_vectors.groups import group_of

_BLOCK = 2**18  # numbers that are there in float64 at a time
COLUMNS = ("expert", "module", "relative_error", "cosine", "weight_error", "bytes", "bfloat16_bytes")


@dataclass(frozen=True)
class Sums:
    """|T - T'|^2, |T|^2, |T'|^2, <T, T'> and |W0|^2 over some tensors."""

    error: float = 0.0
    exact: float = 0.0
    stored: float = 0.0
    product: float = 0.0
    base: float = 0.0

    @classmethod
    def of(cls, exact: Tensor, stored: Tensor, base: Tensor) -> Sums:
        """The sums of a tensor or of some rows of it."""
        total = torch.zeros(5, dtype=torch.float64)
        blocks = (tensor.flatten().split(_BLOCK) for tensor in (exact, stored, base))
        for each in zip(*blocks, strict=True):
            t, s, w = (block.double() for block in each)
            e = t - s
            total += torch.stack([torch.dot(x, y) for x, y in ((e, e), (t, t), (s, s), (t, s), (w, w))])
        return cls(*total.tolist())

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    @property
    def relative_error(self) -> float:
        return _ratio(self.error, self.exact)

    @property
    def weight_error(self) -> float:
        return _ratio(self.error, self.base)

    @property
    def cosine(self) -> float:
        lengths = math.sqrt(self.exact) * math.sqrt(self.stored)
        return self.product / lengths if lengths else float(self.exact == self.stored)


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else (math.inf if part else 0.0)


@dataclass(frozen=True)
class ModuleError:
    """One line of the report: what is stored of a module of an expert, and in how many bytes."""

    expert: str
    module: str
    sums: Sums
    nbytes: int
    bfloat16_bytes: int


def by_module(expert: str, tensors: Mapping[str, tuple[Sums, int, int]]) -> list[ModuleError]:
    """tensors: name -> sums, bytes as stored, bytes in bfloat16; those of one module are added up."""
    modules: dict[str, list[tuple[Sums, int, int]]] = {}
    for name, each in tensors.items():
        modules.setdefault(group_of(name, "module"), []).append(each)
    return [
        ModuleError(expert, module, sum((e[0] for e in each), Sums()), sum(e[1] for e in each), sum(e[2] for e in each))
        for module, each in modules.items()
    ]


def errors_csv(errors: Sequence[ModuleError]) -> str:
    """A row for each module of each expert, under COLUMNS."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in errors:
        sums = each.sums
        figures = (f"{value:.6g}" for value in (sums.relative_error, sums.cosine, sums.weight_error))
        writer.writerow([each.expert, each.module, *figures, each.nbytes, each.bfloat16_bytes])
    return text.getvalue()


def summary(errors: Sequence[ModuleError], nbytes: int, bfloat16_bytes: int, worst: int = 5) -> list[str]:
    """The modules with the largest relative error, every expert, and the bytes beside those of bfloat16."""
    experts: dict[str, Sums] = {}
    for each in errors:
        experts[each.expert] = experts.get(each.expert, Sums()) + each.sums
    first = sorted(errors, key=lambda each: -each.sums.relative_error)[:worst]
    labels = [(f"{each.expert}: {each.module}", each.sums) for each in first]
    labels += [(f"{expert}: all", sums) for expert, sums in experts.items()]
    width = max([len(label) for label, _ in labels] + [20])
    lines = [f"{'task vector':{width}s}  relative error  cosine   weight error at c = 1"]
    for label, sums in labels:
        relative, weight = 100 * sums.relative_error, 100 * sums.weight_error
        lines.append(f"{label:{width}s}  {relative:12.3f} %  {sums.cosine:.5f}  {weight:10.4f} %")
    share = nbytes / bfloat16_bytes if bfloat16_bytes else 0.0
    lines.append(f"{nbytes / 1e6:.2f} MB, {share:.3f}x the {bfloat16_bytes / 1e6:.2f} MB of bfloat16 task vectors")
    return lines
