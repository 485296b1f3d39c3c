"""Task arithmetic: W0 + lambda sum_i T_i (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from torch import Tensor

from scalemerge.kernels.merge_weights import merge_weights_reference
from scalemerge.merging.registry import merge_method


@merge_method("task_arithmetic", source="Ilharco et al. 2023, arXiv 2212.04089")
def task_arithmetic(base: Tensor, task_vectors: list[Tensor], *, lambda_: float = 0.4) -> Tensor:
    """base and task vectors of one shape, float32. lambda: one number for all experts (0.4, the paper's advice)."""
    return merge_weights_reference(base, task_vectors, [lambda_] * len(task_vectors))
