"""Bytes that a rank holds, stage by stage.

Activations are what torch keeps for backward of one layer, a token, counted on BERT- and Qwen3-shaped models with sdpa
and without dropout (tests/planning holds them to it); merge layers keep as much. With gradient checkpointing a layer
keeps its input alone, and one layer is there whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from scalemerge.planning.shapes import Backbone

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
FORMATS = ("float32", "bfloat16", "int8", "int4", "lora")
GROUP, SCALE = 64, 2  # columns that share a scale, and its bytes
LORA_RANK = 16
DW_CHUNK = 64 * 2**20  # of a GPU, see layers/gathering.py; two at once


@dataclass(frozen=True)
class Bytes:
    """What lies on one rank; `total` is what the device must have."""

    weights: float
    others: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.others + self.gathered + self.activations


def activation_bytes(shape: Backbone, tokens: int, itemsize: int, checkpointing: bool = False) -> float:
    """Kept for backward of a forward pass over so many tokens, all layers. itemsize: 4 or 2 (a bfloat16 model)."""
    width, inner, query, key = shape.width, shape.intermediate, shape.query_width, shape.key_width
    if shape.kind in ("bert", "roberta", "xlm-roberta"):
        one = itemsize * (8 * width + 2 * inner)
    elif itemsize == 4:  # two norms of three, gate, up and their product, q, k before and after norm and rotation
        one = 4 * (6 * width + 4 * inner + 4 * query + 4 * key)
    else:  # norms are made in float32
        one = 16 * width + 8 * inner + 10 * query + 10 * key
    if checkpointing:
        return float(tokens * (itemsize * width * shape.layers + one))
    return float(tokens * one * shape.layers)


def training_bytes(
    shape: Backbone, engine: str, ranks: int, tokens: int, *, bf16: bool = True, checkpointing: bool = False
) -> Bytes:
    """One expert with Adam: weights, gradients, moments and, in bfloat16, float32 masters (2 + 4 + 12 bytes a number as
    gradients are accumulated in float32; 4 + 4 + 8 in float32)."""
    weight, gradient, state = (2, 4, 12) if bf16 else (4, 4, 8)
    p = shape.numbers
    stage = {"plain": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3, "fsdp2": 3}[engine]
    offload = engine == "zero3_offload"
    held = weight * p / (ranks if stage == 3 else 1)
    gradients = gradient * p / (ranks if stage >= 2 else 1)
    optimizer = 0.0 if offload else state * p / (ranks if stage >= 1 else 1)
    layer = max(shape.layer_numbers, shape.embedding_numbers)
    gathered = 2 * weight * layer if stage == 3 else 0.0
    return Bytes(held, gradients + optimizer, gathered, activation_bytes(shape, tokens, weight, checkpointing))


def task_vector_bytes(shape: Backbone, form: str) -> float:
    """One expert's task vector as it is held: matrices in the format, the rest float32 (bfloat16 where dense)."""
    matrices = shape.linear_numbers + shape.embedding_numbers
    if form in ("float32", "bfloat16"):
        return float((4 if form == "float32" else 2) * shape.numbers)
    if form in ("int8", "int4"):
        return (1 if form == "int8" else 0.5) * matrices + SCALE * matrices / GROUP + 4 * shape.rest
    if form == "lora":
        return float(2 * LORA_RANK * shape.layers * sum(rows + columns for rows, columns in shape.linear))
    raise ValueError(f"task vectors are held as one of {', '.join(FORMATS)}, not {form!r}")


def replicated_bytes(
    shape: Backbone, experts: int, form: str, tokens: int, *, bf16: bool = True, checkpointing: bool = False
) -> Bytes:
    """Positioning with everything on every rank: W0 in float32, the task vectors, two merge buffers."""
    activations = activation_bytes(shape, tokens, 2 if bf16 else 4, checkpointing)
    vectors = experts * task_vector_bytes(shape, form)
    return Bytes(4.0 * shape.numbers, vectors, 2.0 * DW_CHUNK, activations)


def sharded_bytes(
    shape: Backbone,
    experts: int,
    form: str,
    ranks: int,
    tokens: int,
    *,
    bf16: bool = True,
    checkpointing: bool = False,
    chunk: int = DW_CHUNK,
) -> Bytes:
    """Positioning with rows of W0 and T_i shared out: two gathered layers and two chunks of dW besides.

    Linear weights lie in bfloat16 as on disk, embeddings in float32; low-rank task vectors are whole on every rank.
    """
    base = (2 * shape.linear_numbers + 4 * shape.embedding_numbers) / ranks + 4 * shape.rest
    vectors = experts * task_vector_bytes(shape, form) / (1 if form == "lora" else ranks)
    itemsize = 2 if bf16 else 4
    return Bytes(
        base,
        vectors,
        2.0 * itemsize * shape.largest_linear + 2 * chunk,
        activation_bytes(shape, tokens, itemsize, checkpointing),
    )
