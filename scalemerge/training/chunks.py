"""The size of a gradient cache's chunks, found on the machine: as many tokens as make it fast, and fit.

Doubling from 1,024 tokens, one forward and backward pass of the longest texts is timed at each size until more tokens
no longer pay (5 %), the batch has no more, or twice as many would not fit into the device's memory. The gradients are
those of a zero loss, so that nothing is left behind in any engine. All ranks take part and agree on one number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from scalemerge.objectives.batches import Feature
from scalemerge.training.engine import Engine

SMALLEST, LARGEST, GAIN, MEMORY_SHARE = 1024, 131072, 1.05, 0.85
LARGEST_ON_CPU = 16384


def find_chunk_tokens(engine: Engine, embed: Callable[[list[Feature]], Tensor], features: Sequence[Feature]) -> int:
    """Tokens of a chunk. embed: a padded batch through the model; features: this rank's texts of the first batch."""
    longest = sorted(features, key=lambda feature: -len(feature["input_ids"]))
    length = len(longest[0]["input_ids"])
    total = max(_each(engine, float(sum(len(feature["input_ids"]) for feature in features))))
    best, best_rate = SMALLEST, 0.0
    tokens = SMALLEST
    while True:
        rows = list(islice(cycle(longest), max(1, tokens // length)))
        used = len(rows) * length
        seconds, grown = _measure(engine, embed, rows)
        rate = min(_each(engine, used / seconds))
        if rate > best_rate * GAIN:
            best, best_rate = tokens, rate
        elif tokens > SMALLEST:
            break
        fits = min(_each(engine, 1.0 if _fits_twice(engine, grown) else 0.0)) > 0
        if tokens >= total or not fits or 2 * tokens > (LARGEST if engine.device.type == "cuda" else LARGEST_ON_CPU):
            break
        tokens *= 2
    return best


def _measure(engine: Engine, embed: Callable[[list[Feature]], Tensor], rows: list[Feature]) -> tuple[float, int]:
    """Seconds of one pass, after one to warm up, and the bytes it added to the device's memory at its peak."""
    cuda = engine.device.type == "cuda"
    seconds, grown = 0.0, 0
    for _ in range(2):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.monotonic()
        engine.backward(lambda: embed(rows).sum() * 0.0, False)
        if cuda:
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
        seconds = time.monotonic() - began
    return seconds, grown


def _fits_twice(engine: Engine, grown: int) -> bool:
    if engine.device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(engine.device).total_memory
    return torch.cuda.memory_allocated() + 2 * grown < MEMORY_SHARE * total


def _each(engine: Engine, value: float) -> list[float]:
    """The value of every rank."""
    values = [0.0] * engine.world
    values[engine.rank] = value
    return engine.sum(*values)
