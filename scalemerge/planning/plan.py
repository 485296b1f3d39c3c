"""`scalemerge plan`: what a recipe needs on so many devices, and what its study costs beside a resampling sweep.

All times are floors: products at the GPU's peak, bytes at full bandwidth, the two overlapping. Nothing is measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scalemerge.planning.hardware import Hardware
from scalemerge.planning.memory import ENGINES, FORMATS, Bytes, replicated_bytes, sharded_bytes, training_bytes
from scalemerge.planning.shapes import Backbone
from scalemerge.planning.traffic import (
    naive_traffic,
    sharded_traffic,
    step_flops,
    step_seconds,
    training_traffic,
)
from scalemerge.recipe import Recipe, Task, Training

USABLE = 0.9  # of a device's memory
TEXTS = 2  # of an example
SWEEP_RUNS = 8


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say. examples: of a task whose recipe states no number; tokens: of a text; runs: joint
    trainings that a resampling sweep would take."""

    examples: int = 100_000
    tokens: int = 128
    runs: int = SWEEP_RUNS


@dataclass(frozen=True)
class Line:
    """One way to run a stage: bytes on a rank, bytes that it sends in a step, least seconds of a step."""

    stage: str
    way: str
    memory: Bytes
    sent: float
    compute: float
    wire: float
    fits: bool

    @property
    def seconds(self) -> float:
        return max(self.compute, self.wire)


@dataclass(frozen=True)
class Plan:
    """lines: every stage and way; chosen: the way with the shortest step that fits, by stage, None where none does.

    hours: of one GPU, at least. examples: of each task. naive_bytes: sent a step by a search under plain ZeRO-3.
    """

    shape: Backbone
    hardware: Hardware
    devices: int
    experts: int
    lines: list[Line]
    chosen: dict[str, Line | None]
    naive_bytes: float
    hours: dict[str, float]
    examples: dict[str, int]
    assumptions: Assumptions

    def as_dict(self) -> dict[str, Any]:
        lines = [{**asdict(line), "total_bytes": line.memory.total, "seconds": line.seconds} for line in self.lines]
        chosen = {stage: line.way if line else None for stage, line in self.chosen.items()}
        return {"shape": asdict(self.shape), "hardware": asdict(self.hardware), "devices": self.devices,
                "experts": self.experts, "lines": lines, "chosen": chosen, "naive_bytes": self.naive_bytes,
                "gpu_hours_at_least": self.hours, "examples": self.examples,
                "assumptions": asdict(self.assumptions)}  # fmt: skip


def make_plan(
    recipe: Recipe, shape: Backbone, hardware: Hardware, devices: int, assumed: Assumptions | None = None
) -> Plan:
    """The plan of a recipe on `devices` GPUs."""
    assumed = assumed or Assumptions()
    lines = [
        *_training(recipe, shape, hardware, devices, assumed),
        *_positioning(recipe, shape, hardware, devices, assumed),
    ]
    chosen: dict[str, Line | None] = {}
    for stage in ("training", "positioning"):
        fitting = [line for line in lines if line.stage == stage and line.fits]
        chosen[stage] = min(fitting, key=lambda line: (line.seconds, _rounding(line)), default=None)
    experts = len(recipe.tasks)
    examples = {
        name: _examples(task, recipe.training_of(name), assumed.examples) for name, task in recipe.tasks.items()
    }

    def hours(count: float, repeated: bool) -> float:
        flops = step_flops(shape, count * TEXTS * assumed.tokens, repeated=repeated, attention_length=assumed.tokens)
        return flops / hardware.flops / 3600

    cached = recipe.training.chunk_tokens is not None
    probe = recipe.positioning.steps * recipe.positioning.rows_per_step * experts
    study = {
        "experts": hours(sum(examples.values()), cached),
        "positioning": hours(probe, recipe.positioning.chunk_tokens is not None),
        f"sweep of {assumed.runs} joint runs": hours(assumed.runs * sum(examples.values()), cached),
    }
    texts = TEXTS * recipe.positioning.rows_per_step * experts
    _, chunks = _tokens(texts, devices, assumed.tokens, recipe.positioning.chunk_tokens)
    naive = naive_traffic(shape, experts, devices, chunks)
    return Plan(shape, hardware, devices, experts, lines, chosen, naive, study, examples, assumed)


def _rounding(line: Line) -> int:
    """Among equally short steps the most exact format is taken."""
    form = line.way.rsplit(" ", 1)[-1]
    return FORMATS.index(form) if form in FORMATS else 0


def _examples(task: Task, settings: Training, otherwise: int) -> int:
    """Examples that an expert sees, where the recipe says so."""
    if settings.max_steps is not None:
        return settings.max_steps * settings.batch_size * settings.accumulate
    limits = [source.limit for source in task.sources]
    rows = otherwise if None in limits else sum(limit for limit in limits if limit)
    return round(min(rows, task.cap or rows) * settings.epochs)


def _line(stage: str, way: str, memory: Bytes, sent: float, flops: float, ranks: int, hardware: Hardware) -> Line:
    compute, wire = step_seconds(flops, sent, ranks, hardware)
    return Line(stage, way, memory, sent, compute, wire, memory.total <= USABLE * hardware.memory)


def _tokens(texts: int, ranks: int, per_text: int, chunk: Any) -> tuple[int, int]:
    """Tokens of a rank that are in a graph at once, and how many chunks they come in."""
    whole = -(-texts * per_text // ranks)
    if chunk is None:
        return whole, 1
    most = 8192 if chunk == "auto" else int(chunk)
    return min(whole, most), -(-whole // most)


def _training(recipe: Recipe, shape: Backbone, hardware: Hardware, devices: int, assumed: Assumptions) -> list[Line]:
    settings = recipe.training
    texts = TEXTS * settings.batch_size
    found = []
    for engine in ENGINES:
        ranks = 1 if engine == "plain" else devices
        if engine != "plain" and ranks == 1 and engine != "zero3_offload":
            continue
        tokens, chunks = _tokens(texts, ranks, assumed.tokens, settings.chunk_tokens)
        memory = training_bytes(
            shape, engine, ranks, tokens, bf16=settings.precision == "bf16",
            checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip
        flops = step_flops(
            shape, texts * assumed.tokens, repeated=settings.chunk_tokens is not None, attention_length=assumed.tokens
        )
        sent = training_traffic(shape, engine, ranks, chunks)
        found.append(_line("training", engine, memory, sent, flops, ranks, hardware))
    return found


def _positioning(recipe: Recipe, shape: Backbone, hardware: Hardware, devices: int, assumed: Assumptions) -> list[Line]:
    settings, experts = recipe.positioning, len(recipe.tasks)
    texts = TEXTS * settings.rows_per_step * experts
    tokens, chunks = _tokens(texts, devices, assumed.tokens, settings.chunk_tokens)
    flops = step_flops(
        shape, texts * assumed.tokens, repeated=settings.chunk_tokens is not None, attention_length=assumed.tokens
    )
    how: dict[str, bool] = {"bf16": settings.precision == "bf16", "checkpointing": settings.recompute != "none"}
    found = []
    for form in FORMATS:
        memory = replicated_bytes(shape, experts, form, tokens, **how)
        found.append(_line("positioning", f"replicated, {form}", memory, 0.0, flops, devices, hardware))
    ranks = 2
    while ranks <= devices:
        for form in FORMATS:
            memory = sharded_bytes(shape, experts, form, ranks, tokens, **how)
            sent = sharded_traffic(shape, ranks, chunks, low_rank_only=form == "lora")
            line = _line("positioning", f"sharded over {ranks}, {form}", memory, sent, flops, devices, hardware)
            if ranks <= hardware.gpus_per_node < devices:  # a copy inside each machine: only its link carries it
                wire = sent / hardware.link
                line = Line(line.stage, line.way, memory, sent, line.compute, wire, line.fits)
            found.append(line)
        ranks *= 2
    return found
