"""The `slerp` position: iterated spherical interpolation of task vectors, in Gram coordinates.

    d = e_1;  for i = 2..E:  t = a_i / (mean(a_1..a_{i-1}) + a_i),
                             d <- sin((1-t)W)/sin W d + sin(tW)/sin W e_i,   cos W = d'G e_i / sqrt(d'Gd G_ii)

Source: Self Positioning, Li et al. 2024 (arXiv 2410.15035); spherical interpolation: Shoemake 1985. It depends on the
order of the experts. sin(tW)/sin W is an analytic function of cos W at W = 0,

    sin(tW)/sin W = t 2F1(1+t, 1-t; 3/2; (1 - cos W)/2),

so nearly parallel vectors are served by that series and not by linear interpolation, whose gradient would be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SERIES_BELOW = 0.02  # (1 - cos W) under which the series is used; its 10th term is then below 1e-18
_SERIES_TERMS = 10
_ANTIPARALLEL = -1.0 + 1e-9  # interpolation is undefined at exactly opposite vectors; stay finite beside it


def sine_ratio(t: Tensor, cosine: Tensor) -> Tensor:
    """sin(t W) / sin(W) with cos W = `cosine`; finite values and gradients for all W in [0, pi)."""
    cosine = cosine.clamp(min=_ANTIPARALLEL)
    near = 1 - cosine < _SERIES_BELOW
    angle = torch.acos(torch.where(near, torch.zeros_like(cosine), cosine))
    exact = torch.sin(t * angle) / torch.sin(angle)
    z = torch.where(near, (1 - cosine) / 2, torch.zeros_like(cosine))
    term, series = torch.ones_like(z), torch.ones_like(z)
    for n in range(_SERIES_TERMS):
        term = term * (n + 1 + t) * (n + 1 - t) / ((n + 1.5) * (n + 1)) * z
        series = series + term
    return torch.where(near, t * series, exact)


def _cosine_to(direction: Tensor, gram: Tensor, i: int) -> Tensor:
    """cos of the angle between a direction [P, E] and task vector i; 0 where either is zero."""
    along = (direction.unsqueeze(-2) @ gram[..., i : i + 1]).squeeze(-1).squeeze(-1)
    square = ((direction.unsqueeze(-2) @ gram).squeeze(-2) * direction).sum(-1) * gram[..., i, i]
    safe = square > 0
    return torch.where(safe, along / torch.where(safe, square, torch.ones_like(square)).sqrt(), 0.0 * along)


def slerp(a: Tensor, gram: Tensor) -> Tensor:
    """Directions d [P, E] of positive shares a [P, E] under Gram matrices [P, E, E]; order of the experts as given."""
    experts = a.shape[-1]
    basis = torch.eye(experts, dtype=a.dtype, device=a.device)
    direction = basis[0].expand_as(a)
    for i in range(1, experts):
        t = a[..., i] / (a[..., :i].mean(-1) + a[..., i])
        cosine = _cosine_to(direction, gram, i)
        kept, added = sine_ratio(1 - t, cosine), sine_ratio(t, cosine)
        direction = kept.unsqueeze(-1) * direction + added.unsqueeze(-1) * basis[i]
    return direction


def slerp_start(c: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The shares a [P, E] and length lambda [P] with lambda slerp(a) = c, for positive c [P, E].

    Solved in closed form, expert by expert: with the running direction k (c_1, .., c_{i-1}) and the angle W to T_i,
    tan(tW) = r sin W / (1 + r cos W) where r = c_i k. (a_1 = 1; only ratios matter.)
    """
    experts = c.shape[-1]
    a = torch.ones_like(c)
    scale = 1 / c[..., 0]
    for i in range(1, experts):
        partial = torch.cat([c[..., :i], torch.zeros_like(c[..., i:])], dim=-1)
        cosine = _cosine_to(partial, gram, i).clamp(-1 + 1e-9, 1.0)
        ratio = c[..., i] * scale
        angle = torch.acos(cosine)
        parallel = angle < 1e-6
        safe = torch.where(parallel, torch.ones_like(angle), angle)
        t = torch.where(
            parallel,
            ratio / (1 + ratio),
            torch.atan2(ratio * torch.sin(safe), 1 + ratio * torch.cos(safe)) / safe,
        )
        a[..., i] = a[..., :i].mean(-1) * t / (1 - t)
        scale = scale * sine_ratio(1 - t, cosine)
    return a, 1 / scale
