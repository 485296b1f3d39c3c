"""A deterministic search: BFGS on the whole probe set, as a few numbers deserve a second-order method.

Every evaluation costs a pass over the probe set, and the arithmetic between them nothing: so the approximation of the
inverse Hessian is kept whole (as many rows as numbers learned), and each step is tried at its full length first. Steps
are accepted by the strong Wolfe conditions (Nocedal and Wright 2006, algorithms 3.5 and 6.1), with cubic interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # of the gradient's norm at the start
ARMIJO, CURVATURE = 1e-4, 0.9
FIRST_STEP = 0.3  # of the learned numbers' norm at most


@dataclass(frozen=True)
class Evaluation:
    """The objective and its gradient at a point; both vectors [n] float64."""

    point: Tensor
    value: float
    gradient: Tensor

    @classmethod
    def of(cls, module: nn.Module, value: float) -> Evaluation:
        """Where a module's parameters stand, with the gradients that lie in them."""
        parameters = list(module.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return cls(flatten(parameters), value, flatten(gradients))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        value = torch.tensor(self.value, dtype=torch.float64)
        return {f"{prefix}.point": self.point, f"{prefix}.value": value, f"{prefix}.gradient": self.gradient}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Evaluation:
        value = tensors[f"{prefix}.value"].item()
        return cls(tensors[f"{prefix}.point"], value, tensors[f"{prefix}.gradient"])


@dataclass(frozen=True)
class Minimum:
    value: float
    gradient_norm: float
    converged: bool


def flatten(tensors: list[Tensor] | list[nn.Parameter]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors])


def minimize(
    module: nn.Module,
    evaluate: Callable[[], Evaluation],
    known: list[Evaluation],
    most: int,
    tolerance: float = TOLERANCE,
) -> Minimum:
    """Move the parameters of `module` to a minimum, in at most `most` evaluations.

    evaluate: the objective and gradient where the parameters stand. known: the first evaluations of an earlier run of
    the same search, which are not made again. Ends where the gradient's norm is below `tolerance` of the start's.
    """
    return _Search(module, evaluate, known, most, tolerance).run()


class _Search:
    def __init__(
        self,
        module: nn.Module,
        evaluate: Callable[[], Evaluation],
        known: list[Evaluation],
        most: int,
        tolerance: float,
    ) -> None:
        self.module, self.evaluate, self.known = module, evaluate, known
        self.most, self.tolerance, self.made = most, tolerance, 0

    def at(self, point: Tensor) -> Evaluation:
        """The evaluation at a point, rounded to the parameters' dtype."""
        start = 0
        with torch.no_grad():
            for parameter in self.module.parameters():
                part = point[start : start + parameter.numel()]
                parameter.copy_(part.view(parameter.shape))
                start += parameter.numel()
        self.made += 1
        return self.known.pop(0) if self.known else self.evaluate()

    def run(self) -> Minimum:
        here = first = self.at(flatten(list(self.module.parameters())))
        inverse: Tensor | None = None
        goal = self.tolerance * float(first.gradient.norm())
        while float(here.gradient.norm()) > goal and self.made < self.most:
            direction = -here.gradient if inverse is None else -(inverse @ here.gradient)
            if float(direction @ here.gradient) >= 0:  # rounding has spoilt it
                inverse, direction = None, -here.gradient
            length = 1.0
            if inverse is None:
                length = min(1.0, FIRST_STEP * max(1e-8, float(here.point.norm())) / float(direction.norm()))
            there = self._line(here, direction, length)
            if there is None:
                break
            step, change = there.point - here.point, there.gradient - here.gradient
            curvature = float(step @ change)
            if curvature > 1e-10 * float(step.norm() * change.norm()):
                if inverse is None:
                    inverse = torch.eye(len(step), dtype=torch.float64) * (curvature / float(change @ change))
                left = torch.eye(len(step), dtype=torch.float64) - torch.outer(step, change) / curvature
                inverse = left @ inverse @ left.T + torch.outer(step, step) / curvature
            here = there
        self._settle(here)
        return Minimum(here.value, float(here.gradient.norm()), float(here.gradient.norm()) <= goal)

    def _settle(self, here: Evaluation) -> None:
        start = 0
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(here.point[start : start + parameter.numel()].view(parameter.shape))
                start += parameter.numel()

    def _line(self, here: Evaluation, direction: Tensor, length: float) -> Evaluation | None:
        """A point along the direction that satisfies the strong Wolfe conditions, else the best found, if any is."""
        slope = float(direction @ here.gradient)
        low, low_at, high = 0.0, here, math.inf
        high_at: Evaluation | None = None
        for _ in range(12):
            if self.made >= self.most:
                break
            there = self.at(here.point + length * direction)
            new_slope = float(direction @ there.gradient)
            if there.value > here.value + ARMIJO * length * slope or (low > 0 and there.value >= low_at.value):
                high, high_at = length, there
            elif abs(new_slope) <= -CURVATURE * slope:
                return there
            elif new_slope * (high - low) >= 0:
                high, high_at, low, low_at = low, low_at, length, there
            else:
                low, low_at = length, there
            length = self._between(low, low_at, high, high_at, direction) if high_at is not None else 2.5 * length
            if abs(length - low) * float(direction.norm()) <= 1e-7 * max(1.0, float(here.point.norm())):
                break
        return low_at if low_at is not here and low_at.value < here.value else None

    @staticmethod
    def _between(low: float, low_at: Evaluation, high: float, high_at: Evaluation, direction: Tensor) -> float:
        """The minimum of the cubic through both ends, kept off them."""
        slope_low, slope_high = float(direction @ low_at.gradient), float(direction @ high_at.gradient)
        d1 = slope_low + slope_high - 3 * (low_at.value - high_at.value) / (low - high)
        square = d1 * d1 - slope_low * slope_high
        middle = (low + high) / 2
        if square >= 0:
            d2 = math.copysign(math.sqrt(square), high - low)
            divisor = slope_high - slope_low + 2 * d2
            if divisor:
                middle = high - (high - low) * (slope_high + d2 - d1) / divisor
        left, right = min(low, high), max(low, high)
        margin = 0.1 * (right - left)
        return min(max(middle, left + margin), right - margin)
