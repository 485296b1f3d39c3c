"""The cost ledger: what a model took to make, in examples, tokens, FLOPs, seconds and bytes.

FLOPs are counted from shapes and padded lengths: 2 per weight of every linear layer and token, and 4 L D per token and
layer for attention over L tokens of width D. Training costs three such forward passes (forward, gradient of the input,
gradient of the weights); so does positioning, whose third product gives the coefficients' gradient.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Cost:
    """seconds: wall; examples: rows; tokens: without padding; flops: with padding; peak_bytes: process or GPU."""

    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    flops: float = 0.0
    peak_bytes: int = 0
    device: str = "cpu"
    includes: list[str] = field(default_factory=list)

    def plus(self, *others: Cost) -> Cost:
        """The sum of costs; peak is the largest."""
        parts = [self, *others]
        return Cost(
            seconds=sum(part.seconds for part in parts),
            examples=sum(part.examples for part in parts),
            tokens=sum(part.tokens for part in parts),
            flops=sum(part.flops for part in parts),
            peak_bytes=max(part.peak_bytes for part in parts),
            device=self.device,
            includes=list(self.includes),
        )

    def including(self, others: Mapping[str, Cost]) -> Cost:
        """This cost with those of other models added and named under `includes`."""
        total = self.plus(*others.values())
        total.includes += list(others)
        return total

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cost:
        return cls(**{key: value for key, value in values.items() if key in cls.__dataclass_fields__})


class FlopCounter:
    """Forward FLOPs of a backbone by shapes alone.

    weights: elements of all linear weights that every token meets; width and layers as in the model's configuration.
    """

    def __init__(self, backbone: Any) -> None:
        from torch import nn

        linear = [
            getattr(module.weight, "ds_numel", module.weight.numel())  # ZeRO-3 leaves a shard in its place
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Linear) and "pooler" not in name
        ]
        self.weights = sum(linear)
        self.width = int(backbone.config.hidden_size)
        self.layers = int(backbone.config.num_hidden_layers)

    def forward(self, shapes: Iterable[Sequence[int]]) -> float:
        """FLOPs of one forward pass over padded batches of shapes (rows, length)."""
        return float(
            sum(rows * length * (2 * self.weights + 4 * length * self.width * self.layers) for rows, length in shapes)
        )


def peak_bytes(device: str = "cpu") -> int:
    """Peak memory: of the CUDA allocator on a GPU, else resident memory of this process."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
