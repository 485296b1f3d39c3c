"""Which rows go into which batch: the whole plan of a run, made before it starts from the seed alone.

Batches are task-homogeneous, and no text occurs twice in a batch of in-batch negatives (it would be its own negative).
As the plan is a pure function of data, settings and seed, resuming is reading the next entry, and any number of ranks
sees the same global batches.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scalemerge.data.tasks import TaskRows
from scalemerge.errors import InputError


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: rows (numbers into the task's table) of one task."""

    task: str
    rows: tuple[int, ...]


def batch_stream(rows: TaskRows, batch_size: int, seed: int, samples_per_label: int = 4) -> Iterator[tuple[int, ...]]:
    """Endless full batches: each pass over the data in a new seeded order, leftovers carried into the next pass."""
    generator = random.Random(f"{seed}/{rows.name}")
    carried: list[int] = []
    while True:
        order = carried + _one_pass(rows, generator, samples_per_label)
        full, carried = _fill(rows, order, batch_size)
        if not full:
            raise InputError(
                f"tasks.{rows.name}: cannot fill a batch of {batch_size} with different texts from {len(rows)} rows; "
                "lower batch_size or give more data"
            )
        yield from full


def _one_pass(rows: TaskRows, generator: random.Random, samples_per_label: int) -> list[int]:
    order = list(range(len(rows)))
    generator.shuffle(order)
    if rows.kind != "labelled_texts":
        return order
    by_label: dict[str, list[int]] = defaultdict(list)
    labels = list(rows.data["label"])
    for row in order:
        by_label[labels[row]].append(row)
    clumps: list[list[int]] = []
    for _, members in sorted(by_label.items()):
        parts = [members[start : start + samples_per_label] for start in range(0, len(members), samples_per_label)]
        if len(parts) > 1 and len(parts[-1]) == 1:  # a text alone has no positive
            parts[-2:] = [parts[-2] + parts[-1]]
        clumps += parts
    generator.shuffle(clumps)
    return [row for clump in clumps for row in clump]


def _fill(rows: TaskRows, order: Sequence[int], size: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Batches of exactly `size` rows without a repeated text; a row that does not fit waits for the next batch."""
    full: list[tuple[int, ...]] = []
    waiting: list[int] = []
    position = 0
    unique = rows.kind != "scored_pairs"
    while True:
        batch: list[int] = []
        seen: set[int] = set()
        still: list[int] = []
        queue = waiting
        taken_from_queue = 0
        while len(batch) < size:
            if taken_from_queue < len(queue):
                row = queue[taken_from_queue]
                taken_from_queue += 1
            elif position < len(order):
                row = order[position]
                position += 1
            else:
                break
            texts = rows.texts[row]
            if unique and any(text in seen for text in texts):
                still.append(row)
                continue
            batch.append(row)
            seen.update(texts)
        waiting = still + queue[taken_from_queue:]
        if len(batch) < size:
            return full, batch + waiting
        full.append(tuple(batch))


def mixing_weights(
    sizes: Mapping[str, int],
    *,
    alpha: float = 1.0,
    cap: int | None = None,
    caps: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """p_i proportional to min(n_i, cap)^alpha, or to the weights given. Sums to 1."""
    if weights:
        raw = {task: float(weights.get(task, 0.0)) for task in sizes}
    else:
        limits = {task: min(x for x in (size, cap, (caps or {}).get(task)) if x) for task, size in sizes.items()}
        largest = max(limits.values())
        raw = {task: (limit / largest) ** alpha for task, limit in limits.items()}  # relative: no overflow
    total = sum(raw.values())
    if not total > 0 or any(value < 0 for value in raw.values()):
        raise InputError("joint: the mixing weights must be positive for at least one task and negative for none")
    return {task: value / total for task, value in raw.items()}


def allot(weights: Mapping[str, float], steps: int) -> dict[str, int]:
    """Whole numbers of steps per task that sum to `steps`, by largest remainder: no sampling noise in the mixture."""
    counts = {task: int(weight * steps) for task, weight in weights.items()}
    remainders = sorted(weights, key=lambda task: (counts[task] - weights[task] * steps, task))
    for task in remainders[: steps - sum(counts.values())]:
        counts[task] += 1
    return counts


def plan_batches(
    tables: Mapping[str, TaskRows],
    steps: Mapping[str, int],
    batch_size: int,
    seed: int,
    samples_per_label: int = 4,
) -> list[PlannedBatch]:
    """The batches of a run: `steps[task]` of each task, in a seeded order."""
    order = [task for task, count in sorted(steps.items()) for _ in range(count)]
    random.Random(f"{seed}/order").shuffle(order)
    streams = {
        task: batch_stream(tables[task], batch_size, seed, samples_per_label) for task in sorted(steps) if steps[task]
    }
    return [PlannedBatch(task, next(streams[task])) for task in order]


def steps_for(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps for so many passes over the data; at least one."""
    steps = max(1, round(rows * epochs / batch_size))
    return min(steps, max_steps) if max_steps else steps
