"""Embeddings W(c)[ids]: only the rows that occur are merged, and the gradient of c is gathered, not scattered.

    y = W0[ids] + sum_i c_i T_i[ids]        dc_i = <dY, T_i[ids]>

Nothing the size of the vocabulary is made, forward or backward; only the ids are saved. A low-rank task vector B A
gives (B[ids] * c) A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalemerge.kernels.coefficient_grad import embedding_coefficient_grad
from scalemerge.kernels.formats import accumulation_dtype, dequantize_into
from scalemerge.kernels.merge_weights import merge_weights_reference, merge_weights_triton
from scalemerge.kernels.tiles import use_triton
from scalemerge.layers.merged import MergedLayer


@torch.library.custom_op("scalemerge::merged_embedding", mutates_args=())
def merged_embedding(
    ids: Tensor,
    coefficients: Tensor,
    base: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    groups: Sequence[int],
) -> Tensor:
    """W(c)[ids]. ids: [M]; coefficients: [E]; base: [V, K]. Returns [M, K] in the base's dtype."""
    if use_triton(base):
        out = base.new_empty(len(ids), base.shape[1])
        return merge_weights_triton(base, values, scales, groups, coefficients, out, index=ids)
    dtype = accumulation_dtype(base.dtype)

    def rows(value: Tensor, scale: Tensor, group: int) -> Tensor:
        picked = value[ids]
        if not group:
            return picked
        return dequantize_into(torch.empty(len(ids), base.shape[1], dtype=dtype), picked, scale[ids], group)

    vectors = (rows(*one) for one in zip(values, scales, groups))
    return merge_weights_reference(base[ids], vectors, coefficients.tolist()).to(base.dtype)


@merged_embedding.register_fake
def _(ids: Tensor, coefficients: Any, base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(ids.shape[0], base.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, coefficients, _, values, scales, groups = inputs
    ctx.save_for_backward(ids, *values, *scales)
    ctx.groups, ctx.dtype = groups, coefficients.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    ids, *packed = ctx.saved_tensors
    experts = len(ctx.groups)
    dc = embedding_coefficient_grad(ids, dy.contiguous(), packed[:experts], packed[experts:], ctx.groups)
    return None, dc.to(ctx.dtype), None, [None] * experts, [None] * experts, None


merged_embedding.register_autograd(_backward, setup_context=_save)


class MergedEmbedding(MergedLayer):
    """W(c)[ids] in place of nn.Embedding, times `embed_scale` where the module has one (Gemma)."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., K] in the weight's dtype."""
        packed, flat = self.task_vectors["weight"], ids.reshape(-1)
        c = self.coefficients.of(f"{self.name}.weight")
        if c.dim() == 2:
            raise ValueError(f"{self.name}.weight: coefficients by row are for linear layers, not embeddings")
        own = c if packed.all_merged else c[list(packed.merged)]
        if packed.values:
            y = merged_embedding(flat, own, self.weight, packed.values, packed.scales, packed.groups)
        else:
            y = self.weight[flat]
        if packed.low_rank is not None:
            b, a = packed.b[flat], packed.a  # type: ignore[index]
            dtype = accumulation_dtype(y.dtype)
            y = y + ((b.to(dtype) * c[packed.low_rank].to(dtype)) @ a.to(dtype)).to(y.dtype)  # type: ignore[union-attr]
        return scaled(y, self.original).view(*ids.shape, y.shape[-1])


def scaled(y: Tensor, original: nn.Module) -> Tensor:
    """Embeddings times the `embed_scale` of the module that they stand for, where it has one."""
    scale = getattr(original, "embed_scale", None)
    return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)
