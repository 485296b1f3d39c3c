"""Positions: from a few learned numbers to merging coefficients c [groups, experts].

    c = lambda d(a),   a_i > 0 and lambda > 0 through softplus      (slerp, multislerp)
    c free, lambda = |c|                                             (linear)

Each group (the whole model, a layer, a module) has its own a and lambda and its own Gram matrix. The learned numbers
are float32, as Adam's steps of 1e-4 would round away in bfloat16; the arithmetic in between is float64, which costs
nothing at this size and keeps angles of nearly parallel vectors exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalemerge.errors import InputError
from scalemerge.positioning.multislerp import multislerp, multislerp_start
from scalemerge.positioning.slerp import slerp, slerp_start


@dataclass(frozen=True)
class Shape:
    """A way to turn shares a [P, E] into directions d [P, E], and back from stated coefficients."""

    direction: Callable[[Tensor, Tensor], Tensor]
    start: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ordered: bool


SHAPES = {
    "slerp": Shape(slerp, slerp_start, ordered=True),
    "multislerp": Shape(multislerp, multislerp_start, ordered=False),
}
POSITIONS = (*SHAPES, "linear")


def inverse_softplus(value: Tensor) -> Tensor:
    """x with softplus(x) = value > 0."""
    return value + torch.log(-torch.expm1(-value))


class Position(nn.Module):
    """The learned numbers of all groups.

    kind: "slerp", "multislerp" or "linear". gram: [P, E, E]. order: permutation of the experts that slerp visits;
    inputs and outputs are in the experts' own order all the same. start: c [E] or [P, E], equal shares 1/E by default.
    """

    gram: Tensor

    def __init__(
        self,
        kind: str,
        gram: Tensor,
        *,
        order: Sequence[int] | None = None,
        start: Sequence[float] | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if kind not in POSITIONS:
            raise InputError(f"positioning.position: '{kind}' is not one of {', '.join(POSITIONS)}")
        groups, experts = gram.shape[0], gram.shape[-1]
        self.kind = kind
        self.order = list(range(experts)) if order is None else list(order)
        if sorted(self.order) != list(range(experts)):
            raise InputError(f"positioning.order: {order} does not name each of the {experts} experts once")
        self.inverse = [self.order.index(i) for i in range(experts)]
        self.register_buffer("gram", gram.double()[:, self.order][:, :, self.order], persistent=False)
        target = torch.as_tensor([1 / experts] * experts if start is None else start, dtype=torch.float64)
        target = target.expand(groups, experts)[:, self.order]
        if not torch.isfinite(target).all() or (kind != "linear" and not (target > 0).all()):
            raise InputError(f"positioning.start: {kind} starts from positive coefficients; use position: linear")
        if kind == "linear":
            self.raw_c = nn.Parameter(target.to(dtype).clone())
        else:
            a, length = SHAPES[kind].start(target, self.gram)
            a = a / a.mean(-1, keepdim=True)
            self.raw_a = nn.Parameter(inverse_softplus(a).to(dtype))
            self.raw_lambda = nn.Parameter(inverse_softplus(length).to(dtype))

    @property
    def a(self) -> Tensor:
        """Shares [P, E] in the experts' own order; for `linear`, the unit direction of c."""
        values = self._shares()
        return values[:, self.inverse]

    def _shares(self) -> Tensor:
        if self.kind == "linear":
            c = self.raw_c.double()
            return c / c.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return F.softplus(self.raw_a.double())

    @property
    def length(self) -> Tensor:
        """lambda [P]."""
        if self.kind == "linear":
            square = self.raw_c.double().square().sum(-1)
            return torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)
        return F.softplus(self.raw_lambda.double())

    def forward(self) -> Tensor:
        """c [P, E] in the experts' own order, in the dtype of the learned numbers."""
        if self.kind == "linear":
            return self.raw_c[:, self.inverse]
        direction = SHAPES[self.kind].direction(self._shares(), self.gram)
        c = self.length.unsqueeze(-1) * direction
        return c[:, self.inverse].to(self.raw_a.dtype)

    @torch.no_grad()
    def order_effect(self) -> float:
        """How far the reverse order moves the merged task vector at the same a and lambda, relative to its length.

        0 for positions without an order. The mean over groups of |T(c) - T(c reversed)| / |T(c)|.
        """
        if self.kind == "linear" or not SHAPES[self.kind].ordered or len(self.order) < 2:
            return 0.0
        shares = self._shares()
        here = SHAPES[self.kind].direction(shares, self.gram)
        flipped = SHAPES[self.kind].direction(shares.flip(-1), self.gram.flip(-1).flip(-2)).flip(-1)

        def norm(d: Tensor) -> Tensor:
            return ((d.unsqueeze(-2) @ self.gram).squeeze(-2) * d).sum(-1).clamp(min=0).sqrt()

        effect = norm(here - flipped) / norm(here).clamp(min=1e-300)
        value = float(effect.mean())
        return value if math.isfinite(value) else 0.0
