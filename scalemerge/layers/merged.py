"""Layers whose weights are W(c) = W0 + sum_i c_i T_i with frozen W0 and T_i, and exact gradients for input and c.

The merged weight exists for some rows at a time, forward and backward, and is never saved: the autograd Functions keep
their input only and merge again in backward. Memory beyond W0, the T_i and the activations is one chunk of rows. Peers
keep the merged model (or E weight gradients) alive for the whole step.

    y  = x W(c)' + b(c)
    dX = dY W(c)                    merged again, rows by rows
    dc = <dY' x, T_i>               one weight-gradient product for all E
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from scalemerge.kernels.coefficient_grad import coefficient_grad_reference, embedding_coefficient_grad_reference
from scalemerge.kernels.merge_weights import accumulation_dtype, merge_weights_reference
from scalemerge.layers.coefficients import Coefficients

DEFAULT_CHUNK_BYTES = 4 * 2**20


def _chunks(base: Tensor, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fill `chunk_bytes` in the dtype they are merged in."""
    row_bytes = base[0].numel() * accumulation_dtype(base.dtype).itemsize
    step = max(1, chunk_bytes // max(1, row_bytes))
    for start in range(0, base.shape[0], step):
        yield start, min(base.shape[0], start + step)


class _MergedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, coefficients: Tensor, base: Tensor, task_vectors: Sequence[Tensor], chunk_bytes: int
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        values = coefficients.detach().tolist()
        y = flat.new_empty(len(flat), base.shape[0])
        with torch.autocast(device, enabled=False):
            for start, stop in _chunks(base, chunk_bytes):
                weight = merge_weights_reference(base, task_vectors, values, start, stop).to(dtype)
                torch.mm(flat, weight.T, out=y[:, start:stop])
        ctx.save_for_backward(flat)
        ctx.base, ctx.task_vectors, ctx.values, ctx.chunk_bytes = base, task_vectors, values, chunk_bytes
        ctx.shape, ctx.input_dtype, ctx.coefficient_dtype = x.shape, x.dtype, coefficients.dtype
        return y.view(*x.shape[:-1], base.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = ctx.saved_tensors
        dy = gradients[0].reshape(len(flat), ctx.base.shape[0]).to(flat.dtype)
        need_x, need_c = ctx.needs_input_grad[:2]
        dx = torch.zeros_like(flat) if need_x else None
        dc = torch.zeros(len(ctx.values), dtype=torch.float64, device=flat.device) if need_c else None
        with torch.autocast(flat.device.type, enabled=False):
            for start, stop in _chunks(ctx.base, ctx.chunk_bytes):
                if dx is not None:
                    weight = merge_weights_reference(ctx.base, ctx.task_vectors, ctx.values, start, stop)
                    dx.addmm_(dy[:, start:stop], weight.to(flat.dtype))
                if dc is not None:
                    dc += coefficient_grad_reference(flat, dy, ctx.task_vectors, start, stop)
        return (
            dx.view(ctx.shape).to(ctx.input_dtype) if dx is not None else None,
            dc.to(ctx.coefficient_dtype) if dc is not None else None,
            None,
            None,
            None,
        )


class _MergedEmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, coefficients: Tensor, base: Tensor, task_vectors: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        merged = merge_weights_reference(base[ids], (vector[ids] for vector in task_vectors), coefficients.tolist())
        ctx.save_for_backward(ids)
        ctx.task_vectors, ctx.coefficient_dtype = task_vectors, coefficients.dtype
        return merged.to(base.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        dc = embedding_coefficient_grad_reference(ids, gradients[0], ctx.task_vectors)
        return None, dc.to(ctx.coefficient_dtype), None, None


class MergedLayer(nn.Module):
    """What all merged layers share: the plain module, its task vectors by parameter name, and where c comes from.

    The task vectors are plain attributes, not parameters or buffers: `state_dict` holds the base weights alone.
    """

    def __init__(
        self,
        original: nn.Module,
        task_vectors: dict[str, list[Tensor]],
        coefficients: Coefficients,
        name: str,
    ) -> None:
        super().__init__()
        for parameter, vectors in task_vectors.items():
            base = original.get_parameter(parameter)
            if type(base.data) is not Tensor:
                raise TypeError(f"{name}.{parameter}: sharded weights (DTensor) cannot be merged in place here")
            for vector in vectors:
                if vector.shape != base.shape:
                    raise ValueError(
                        f"{name}.{parameter}: a task vector has shape {tuple(vector.shape)}, the weight "
                        f"{tuple(base.shape)}"
                    )
        self.original = original.requires_grad_(False)
        self.task_vectors = task_vectors
        self.coefficients = coefficients
        self.name = name

    @property
    def weight(self) -> Tensor:
        """The base weight W0: model code asks it for dtype and device."""
        return self.original.get_parameter("weight")

    def merged(self, parameter: str) -> Tensor:
        """A small parameter (bias, norm weight) as W(c) in its own dtype, differentiable in c through plain autograd.

        Summed like the large ones: in float32 or better, rounded once.
        """
        base = self.original.get_parameter(parameter)
        if parameter not in self.task_vectors:
            return base
        dtype = accumulation_dtype(base.dtype)
        total = base.to(dtype)
        values = self.coefficients.of(f"{self.name}.{parameter}").to(dtype)
        for value, vector in zip(values, self.task_vectors[parameter], strict=True):
            total = total + value * vector.to(dtype)
        return total.to(base.dtype)

    @torch.no_grad()
    def restore(self, written: set[int]) -> nn.Module:
        """The plain module, with the merged weights written into it, but for parameters already `written` (by id)."""
        for parameter, vectors in self.task_vectors.items():
            weight = self.original.get_parameter(parameter)
            if id(weight) in written:
                continue
            written.add(id(weight))
            values = self.coefficients.of(f"{self.name}.{parameter}").tolist()
            weight.copy_(merge_weights_reference(weight, vectors, values))
        return self.original

    def extra_repr(self) -> str:
        experts = len(next(iter(self.task_vectors.values())))
        return f"name={self.name}, experts={experts}, parameters={sorted(self.task_vectors)}"


class MergedLinear(MergedLayer):
    """y = x W(c)' + b(c) in place of nn.Linear. chunk_bytes: how much of the merged weight may exist at a time."""

    chunk_bytes = DEFAULT_CHUNK_BYTES

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x's dtype or the autocast one."""
        weight, bias = self.weight, self.original.bias
        if "weight" in self.task_vectors:
            values = self.coefficients.of(f"{self.name}.weight")
            y = _MergedLinearFunction.apply(x, values, weight, self.task_vectors["weight"], self.chunk_bytes)
        else:
            y = F.linear(x, weight)
        return y if bias is None else y + self.merged("bias").to(y.dtype)


class MergedEmbedding(MergedLayer):
    """W(c)[ids] in place of nn.Embedding: only the rows that occur are merged."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., K] in the weight's dtype."""
        values = self.coefficients.of(f"{self.name}.weight")
        return _MergedEmbeddingFunction.apply(ids, values, self.original.weight, self.task_vectors["weight"])


class MergedModule(MergedLayer):
    """Any other module (LayerNorm, the RMSNorms, GPT-2's Conv1D ...): its own forward with merged parameters.

    Through torch.func.functional_call and plain autograd, which keeps the merged parameters for backward: meant for
    norm-sized parameters, correct for all.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        merged = {parameter: self.merged(parameter) for parameter in self.task_vectors}
        return functional_call(self.original, merged, args, kwargs)
