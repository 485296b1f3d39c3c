"""Bytes that a rank sends in a step, and the least time a step can take.

A ring sends (R - 1) / R of what an all-gather puts together or a reduce-scatter takes in, and twice that of an
all-reduce. Within one machine the GPUs' own link counts, between machines the network: the slower of the two decides.
"""

from __future__ import annotations

from scalemerge.planning.hardware import Hardware
from scalemerge.planning.shapes import Backbone


def training_traffic(shape: Backbone, engine: str, ranks: int, chunks: int = 1) -> float:
    """Bytes a rank sends in an optimizer step. chunks: of the gradient cache, each of which gathers (three times: it is
    embedded twice) under ZeRO-3 and FSDP2, and reduces under ZeRO-2 and 3."""
    ring, p = (ranks - 1) / ranks, shape.numbers
    if engine == "plain" or ranks == 1:
        return 0.0
    if engine == "ddp":
        return 2 * ring * 4 * p
    if engine == "zero1":
        return ring * (4 + 4 + 2) * p
    if engine == "zero2":
        return ring * (4 * chunks + 2) * p
    gathers = 2 if chunks == 1 else 3 * chunks
    reduced = 4 if engine == "fsdp2" else 4 * chunks
    return ring * (2 * gathers + reduced) * p


def sharded_traffic(shape: Backbone, ranks: int, chunks: int = 1, *, low_rank_only: bool = False) -> float:
    """Of sharded positioning, whatever the number of experts: the merged layers twice in bfloat16 (three times with a
    gradient cache) and dW once in float32, which LoRA experts alone do not need."""
    ring, p = (ranks - 1) / ranks, shape.linear_numbers
    gathers = 2 if chunks == 1 else 3 * chunks
    return ring * (2 * gathers + (0 if low_rank_only else 4 * chunks)) * p


def naive_traffic(shape: Backbone, experts: int, ranks: int, chunks: int = 1) -> float:
    """Of the same search with W0 and every T_i as parameters under ZeRO-3."""
    ring, p = (ranks - 1) / ranks, shape.linear_numbers
    return ring * 2 * (2 if chunks == 1 else 3 * chunks) * (experts + 1) * p


def step_flops(shape: Backbone, tokens: float, *, repeated: bool, attention_length: int = 0) -> float:
    """Three products of each linear weight and token, four where a gradient cache repeats the forward pass; attention
    over texts of so many tokens besides."""
    products = 4 if repeated else 3
    return products * tokens * (2 * shape.linear_numbers + 4 * attention_length * shape.query_width * shape.layers)


def step_seconds(flops: float, sent: float, ranks: int, hardware: Hardware) -> tuple[float, float]:
    """Computing at the peak, and sending at full bandwidth: at best the two overlap. flops: of all ranks together."""
    speed = hardware.link if ranks <= hardware.gpus_per_node else min(hardware.link, hardware.network)
    return flops / ranks / hardware.flops, sent / speed
