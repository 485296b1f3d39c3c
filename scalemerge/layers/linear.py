"""Linear layers whose weight W(c) is never whole: nn.Linear and GPT-2's Conv1D.

The dense and quantized task vectors of a layer go through merged_product (product.py). Low-rank ones are never merged:
with A and B concatenated over their experts,

    y += ((x A') * c) B'      dc_i = sum of (dY B_i) * (x A_i')

which is 2 M R (N + K) FLOPs, keeps x A' [M, R] alone and needs no weight gradient at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scalemerge.kernels.formats import Packed, accumulation_dtype
from scalemerge.kernels.merge_weights import merge_weights
from scalemerge.layers.merged import MergedLayer
from scalemerge.layers.product import merged_product


class _MergedProduct(MergedLayer):
    along_rows = True

    @torch.compiler.disable  # a compiled graph does not see coefficients move in place
    def _cached(self, packed: Packed, c: Tensor, dtype: torch.dtype) -> Tensor:
        """W(c) whole in `dtype`, made anew when the coefficients have moved."""
        weight, name = self.weight, f"{self.name}.weight"
        key = (self.coefficients.stamp(name), dtype, weight.device)
        if getattr(self, "_cache_key", None) != key:
            rows, columns = weight.shape
            exact = torch.empty(rows, columns, dtype=accumulation_dtype(dtype), device=weight.device)
            out = exact if weight.device.type == "cpu" else exact.to(dtype)
            lists = (packed.values, packed.scales, packed.groups)
            with torch.no_grad():
                merged = merge_weights(weight, *lists, c.detach(), packed.shape, (0, rows), (0, columns), out)
            self._cache, self._cache_key = merged.to(dtype), key
        return self._cache

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], in x's dtype or the autocast one."""
        device, settings = x.device, self.settings
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = self.merged("bias") if self.original.bias is not None else None
        packed = self.task_vectors.get("weight") or Packed.of_none(self.weight.shape)
        c = self.coefficients.of(f"{self.name}.weight") if packed.experts else self.weight.new_empty(0)
        by_row = c.dim() == 2
        if by_row and not self.along_rows:
            raise ValueError(f"{self.name}.weight: coefficients by row are not supported for Conv1D")
        own = c if packed.all_merged else c[list(packed.merged)]
        y = merged_product(
            flat,
            own,
            bias,
            self.weight,
            packed.values,
            packed.scales,
            packed.groups,
            settings.sample(len(flat), device) if packed.values and own.requires_grad else None,
            self._cached(packed, own, dtype) if settings.cache and packed.values else None,
            self.along_rows,
            settings.precision == "split",
            settings.strategy,
            settings.chunk(device),
        )
        if packed.low_rank is not None:
            y = y + low_rank_product(flat, packed, c[packed.low_rank], self.along_rows)
        return y.view(*x.shape[:-1], y.shape[-1])


class MergedLinear(_MergedProduct):
    """y = x W(c)' + b(c) in place of nn.Linear."""


class MergedConv1D(_MergedProduct):
    """y = x W(c) + b(c) in place of transformers' Conv1D (GPT-2), whose weight lies [inputs, outputs]."""

    along_rows = False


def low_rank_product(x: Tensor, packed: Packed, c: Tensor, along_rows: bool = True) -> Tensor:
    """Sum of c_i x T_i' over the low-rank experts. c: [R], or [R, N] by row."""
    a, b = packed.a.to(x.dtype), packed.b.to(x.dtype)  # type: ignore[union-attr]
    if not along_rows:
        a, b = b.T, a.T
    hidden = F.linear(x, a)
    if c.dim() == 2:
        return F.linear(hidden, (b * c.T).to(x.dtype))
    return F.linear((hidden * c).to(x.dtype), b)
