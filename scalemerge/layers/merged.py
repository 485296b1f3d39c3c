"""What all merged layers share: a plain module whose parameters are W(c) = W0 + sum_i c_i T_i, W0 and T_i frozen.

Small parameters (biases, norm weights) are merged whole by a differentiable op; linear layers (linear.py) and
embeddings (embedding.py) never make their merged weight whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from scalemerge.kernels.formats import LowRank, Packed, TaskVector, accumulation_dtype, unpack
from scalemerge.kernels.merge_weights import merge_weights_reference, merged_weight
from scalemerge.layers.coefficients import Coefficients
from scalemerge.layers.settings import MergeSettings


class MergedLayer(nn.Module):
    """A module in place of `original`, which it holds.

    task_vectors: E for each parameter name (dense, quantized or low-rank). They are plain attributes, not parameters or
    buffers: `state_dict` holds the base weights alone. Raises ValueError for shapes that differ, TypeError for sharded
    weights.
    """

    def __init__(
        self,
        original: nn.Module,
        task_vectors: Mapping[str, Sequence[TaskVector]],
        coefficients: Coefficients,
        name: str,
        settings: MergeSettings | None = None,
    ) -> None:
        super().__init__()
        self.task_vectors: dict[str, Packed] = {}
        for parameter, vectors in task_vectors.items():
            base = original.get_parameter(parameter)
            _require_whole(base, f"{name}.{parameter}")
            for vector in vectors:
                if vector.shape != base.shape:
                    raise ValueError(
                        f"{name}.{parameter}: a task vector has shape {tuple(vector.shape)}, the weight "
                        f"{tuple(base.shape)}"
                    )
            self.task_vectors[parameter] = Packed.of(vectors)
        self.original = original.requires_grad_(False)
        self.coefficients = coefficients
        self.settings = settings or MergeSettings()
        self.name = name

    @property
    def weight(self) -> Tensor:
        """The base weight W0: model code asks it for dtype and device."""
        return self.original.get_parameter("weight")

    def merged(self, parameter: str) -> Tensor:
        """A parameter as W(c) whole, in its dtype, differentiable in c. Summed in float32 or better, rounded once."""
        base = self.original.get_parameter(parameter)
        packed = self.task_vectors.get(parameter)
        if packed is None:
            return base
        c = self.coefficients.of(f"{self.name}.{parameter}")
        if c.dim() == 2:
            raise ValueError(f"{self.name}.{parameter}: coefficients by row are for the weights of linear layers only")
        if packed.low_rank is None:
            return merged_weight(base, packed.values, packed.scales, packed.groups, c)
        dtype = accumulation_dtype(base.dtype)
        total = base.to(dtype)
        if packed.values:
            total = merged_weight(total, packed.values, packed.scales, packed.groups, c[list(packed.merged)])
        b, a = packed.b.to(dtype), packed.a.to(dtype)  # type: ignore[union-attr]
        return (total + (b * c[packed.low_rank].to(dtype)) @ a).to(base.dtype)

    @torch.no_grad()
    def restore(self, written: set[int]) -> nn.Module:
        """The plain module, with the merged weights written into it, but for parameters already `written` (by id)."""
        for parameter, packed in self.task_vectors.items():
            weight = self.original.get_parameter(parameter)
            if id(weight) in written:
                continue
            written.add(id(weight))
            c = self.coefficients.of(f"{self.name}.{parameter}")
            c_of = list(c.unsqueeze(2).to(accumulation_dtype(weight.dtype))) if c.dim() == 2 else c.tolist()
            vectors: list[TaskVector] = [
                unpack(*one, packed.shape) for one in zip(packed.values, packed.scales, packed.groups)
            ]
            order = list(packed.merged)
            if packed.low_rank is not None:
                for position in packed.low_rank.unique().tolist():
                    chosen = packed.low_rank == position
                    vectors.append(LowRank(packed.a[chosen], packed.b[:, chosen]))  # type: ignore[index]
                    order.append(position)
            weight.copy_(merge_weights_reference(weight, vectors, [c_of[i] for i in order]))
        return self.original

    def extra_repr(self) -> str:
        experts = next(iter(self.task_vectors.values())).experts
        return f"name={self.name}, experts={experts}, parameters={sorted(self.task_vectors)}"


def _require_whole(weight: Tensor, name: str) -> None:
    """Sharded weights are merged before they are gathered, which is not done here."""
    if type(weight.data) is not Tensor:
        raise TypeError(f"{name}: sharded weights (DTensor) cannot be merged in place here; attach before sharding")
    if getattr(weight, "_is_flat_param", False) or getattr(weight, "_fsdp_flattened", False):
        raise TypeError(f"{name}: weights flattened by FSDP cannot be merged here; attach before wrapping the model")
    if weight.numel() == 0 and getattr(weight, "ds_id", None) is not None:
        raise TypeError(f"{name}: this weight is partitioned by ZeRO-3; attach to a model that is not partitioned")


class MergedModule(MergedLayer):
    """Any other module: its own forward with merged parameters, through torch.func.functional_call.

    Keeps the merged parameters for backward: meant for norm-sized parameters, correct for all.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        merged = {parameter: self.merged(parameter) for parameter in self.task_vectors}
        return functional_call(self.original, merged, args, kwargs)


class MergedLayerNorm(MergedLayer):
    """nn.LayerNorm with merged weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K]."""
        norm = self.original
        weight = self.merged("weight") if norm.weight is not None else None
        bias = self.merged("bias") if norm.bias is not None else None
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)  # type: ignore[arg-type]


class MergedRMSNorm(MergedModule):
    """nn.RMSNorm and transformers' RMSNorm classes, each with its own arithmetic (Gemma's adds one to the weight)."""
