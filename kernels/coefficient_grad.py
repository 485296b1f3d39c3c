"""Gradients of the merging coefficients of y = x W(c)':  dc_i = <dY' x, T_i>.

One weight-gradient product serves all experts; it is made for some rows of W at a time and reduced at once, so dW is
never stored whole. Cost: 2 M N K FLOPs for dW, 2 E N K for the inner products, one read of every T_i. This file
holds the torch reference, which is what the CPU runs; partial sums over row chunks are added in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from scalemerge.kernels.merge_weights import accumulation_dtype


def coefficient_grad_reference(
    x: Tensor, dy: Tensor, task_vectors: Sequence[Tensor], start: int = 0, stop: int | None = None
) -> Tensor:
    """Inner products of rows [start, stop) of dW = dY' x with those rows of every T_i.

    x: [M, K]; dy: [M, N]; task_vectors: E tensors [N, K]. Returns [E] float64 on the device of x.
    """
    stop = dy.shape[1] if stop is None else stop
    dw = dy[:, start:stop].T @ x
    return inner_products(dw, [task_vector[start:stop] for task_vector in task_vectors])


def embedding_coefficient_grad_reference(ids: Tensor, dy: Tensor, task_vectors: Sequence[Tensor]) -> Tensor:
    """The same for an embedding, y = W(c)[ids]:  dc_i = <dY, T_i[ids]>, without a gradient the size of the vocabulary.

    ids: [...]; dy: [..., K]; task_vectors: E tensors [V, K]. Returns [E] float64.
    """
    flat = ids.reshape(-1)
    return inner_products(dy.reshape(len(flat), dy.shape[-1]), (task_vector[flat] for task_vector in task_vectors))


def inner_products(gradient: Tensor, task_vectors: Iterable[Tensor]) -> Tensor:
    """<gradient, T_i> for every T_i of the same shape, summed in float32 or better. Returns [E] float64."""
    flat = gradient.reshape(-1).to(accumulation_dtype(gradient.dtype))
    products = [torch.dot(flat, task_vector.reshape(-1).to(flat.dtype)).double() for task_vector in task_vectors]
    return torch.stack(products)
