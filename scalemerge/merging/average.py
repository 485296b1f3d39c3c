"""Average: W0 + 1/E sum_i T_i, the uniform model soup (Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

from torch import Tensor

from scalemerge.kernels.merge_weights import merge_weights_reference
from scalemerge.merging.registry import merge_method


@merge_method("average", source="Wortsman et al. 2022, arXiv 2203.05482")
def average(base: Tensor, task_vectors: list[Tensor]) -> Tensor:
    """base and task vectors of one shape, float32. Cost: one pass."""
    return merge_weights_reference(base, task_vectors, [1 / len(task_vectors)] * len(task_vectors))
