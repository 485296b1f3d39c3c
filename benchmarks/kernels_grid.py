"""Which cases benchmarks/kernels.py measures, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from kernels_ways import FORMATS, Case

ROWS = (16, 64, 256, 1024, 4096, 16384, 32768)
EXPERTS = (1, 2, 4, 8)

#: layers with different shapes, (N, K) as nn.Linear keeps them
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "MiniLM": {"attention": (384, 384), "up": (1536, 384), "down": (384, 1536)},
    "BERT-base": {"attention": (768, 768), "up": (3072, 768), "down": (768, 3072)},
    "Qwen3-0.6B": {"q": (2048, 1024), "kv": (1024, 1024), "o": (1024, 2048), "up": (3072, 1024), "down": (1024, 3072)},
    "Qwen3-4B": {"q": (4096, 2560), "kv": (1024, 2560), "o": (2560, 4096), "up": (9728, 2560), "down": (2560, 9728)},
    "Qwen3-8B": {"q": (4096, 4096), "kv": (1024, 4096), "up": (12288, 4096), "down": (4096, 12288)},
}
TARGET_LAYER = ("Qwen3-8B", "q")  # N = K = 4096


def case(model: str, layer: str, rows: int, experts: int, form: str) -> Case:
    return Case(model, layer, *LAYERS[model][layer], rows, experts, form)


def targets() -> Iterator[Case]:
    """What the stated targets need."""
    for rows, form in ((4096, "dense"), (32768, "dense"), (64, "dense"), (4096, "int4")):
        yield case(*TARGET_LAYER, rows, 4, form)


def full() -> Iterator[Case]:
    """The whole grid: first the target layer by format and rows, then other layers, other E, the rest."""
    for form, rows in product(FORMATS, ROWS):
        yield case(*TARGET_LAYER, rows, 4, form)
    middle = (64, 1024, 4096, 32768)
    for model, rows in product(("Qwen3-0.6B", "BERT-base", "MiniLM", "Qwen3-4B", "Qwen3-8B"), middle):
        yield case(model, "up", rows, 4, "dense")
    for experts, rows in product((8, 1, 2), middle):
        yield case(*TARGET_LAYER, rows, experts, "dense")
    for experts, form, rows, (model, layers) in product((4, 8, 1, 2), FORMATS, ROWS, LAYERS.items()):
        for layer in layers:
            yield case(model, layer, rows, experts, form)


def small() -> Iterator[Case]:
    """For a CPU: a layer of MiniLM and one of BERT-base, up to 4096 rows, 4 experts and 1."""
    rows = (1024, 64, 4096, 256, 16)
    for experts, form, (model, layer), count in product(
        (4, 1), FORMATS, (("MiniLM", "up"), ("BERT-base", "attention")), rows
    ):
        yield case(model, layer, count, experts, form)


def quick() -> Iterator[Case]:
    """Does it run?"""
    for form, rows, experts in product(FORMATS, (16, 64), (1, 4)):
        yield Case("tiny", "layer", 80, 64, rows, experts, form)


SETS = {"targets": targets, "full": full, "small": small, "quick": quick}


def cases(names: Sequence[str]) -> list[Case]:
    """Those of all sets named, each once."""
    return list(dict.fromkeys(one for name in names for one in SETS[name]()))
