"""The `multislerp` position: a direction between all task vectors at once, with no order.

    c_i = lambda (sum_j w_j |T_j|) w_i / (|T_i| sqrt(w' C w)),   w = a / sum(a),   C the cosines of the task vectors

The unit task vectors are averaged by w, brought back to the sphere, and given the average length; at lambda = 1 it is
mergekit's multislerp (one tangent step at the origin; Goddard et al. 2024, arXiv 2403.13257). The length is in the
units of the other positions, so that lambda, and the penalty mu lambda, are dimensionless.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shapes(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norms [P, E], their safe inverses (0 for a zero task vector) and cosines [P, E, E]."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, 1 / norms.clamp(min=torch.finfo(gram.dtype).tiny), torch.zeros_like(norms))
    return norms, inverse, gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def multislerp(a: Tensor, gram: Tensor) -> Tensor:
    """Directions d [P, E] of positive shares a [P, E] under Gram matrices [P, E, E]."""
    norms, inverse, cosines = _shapes(gram)
    w = a / a.sum(-1, keepdim=True)
    length = ((w.unsqueeze(-2) @ cosines).squeeze(-2) * w).sum(-1, keepdim=True)
    tiny = torch.finfo(a.dtype).eps ** 2
    return (w * norms).sum(-1, keepdim=True) * w * inverse / length.clamp(min=tiny).sqrt()


def multislerp_start(c: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The shares a [P, E] (summing to E) and length lambda [P] with lambda multislerp(a) = c, for positive c."""
    norms, _, _ = _shapes(gram)
    a = c * norms.clamp(min=torch.finfo(gram.dtype).tiny)
    a = a / a.mean(-1, keepdim=True)
    direction = multislerp(a, gram)
    usable = direction > 0
    ratio = torch.where(usable, c / torch.where(usable, direction, torch.ones_like(c)), torch.zeros_like(c))
    return a, ratio.amax(-1)
