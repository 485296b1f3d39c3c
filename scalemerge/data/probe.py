"""Probe sets: the rows that positioning learns from, and those that tell it when to stop.

A probe set that is narrower than its task, or from the very rows an expert has fitted, chooses overfitted positions. So
probe rows are balanced over the data sets within a task, never rows that any expert sees (of any task: the same query
may occur in two), and a second, validation set is kept apart.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scalemerge.data.streams import StreamedRows, check_streamed, is_streamed, open_task
from scalemerge.data.tasks import TaskRows, load_task
from scalemerge.errors import InputError
from scalemerge.recipe import Probe, Recipe

_LARGEST_SHARE = 0.25  # of a task's rows that may be held out in all


@dataclass
class TaskData:
    """A task's rows, split. Those of a stream are read while it is trained on."""

    train: TaskRows | StreamedRows
    probe: TaskRows
    validation: TaskRows


def load_tasks(recipe: Recipe) -> dict[str, TaskData]:
    """Read all tasks and split off their probe sets. Raises InputError before anything is computed.

    Of a stream the first window is read: the probe set is from there, unless it has sources of its own.
    """
    check_streamed(recipe)
    streams = {name: open_task(name, task, recipe) for name, task in recipe.tasks.items() if is_streamed(task)}
    tables = {
        name: load_task(name, task, task.sources, recipe) for name, task in recipe.tasks.items() if name not in streams
    }
    held: dict[str, tuple[TaskRows, TaskRows]] = {}
    given: dict[str, TaskRows] = {}
    for name, task in recipe.tasks.items():
        if task.probe_sources:
            given[name] = load_task(name, task, task.probe_sources, recipe, "probe_sources")
            held[name] = _split(given[name], recipe.probe, share=1.0)
        else:
            rows = streams[name].first if name in streams else tables[name]
            held[name] = _split(rows, recipe.probe, share=_LARGEST_SHARE)
    for name, rows in given.items():
        _refuse_overlap(name, rows, tables)
    kept_apart = set().union(*(part.anchors() for pair in held.values() for part in pair))
    split: dict[str, TaskData] = {}
    for name in recipe.tasks:
        if name in streams:
            split[name] = TaskData(streams[name].without(kept_apart), *held[name])
            continue
        rows = tables[name]
        keep = [index for index in range(len(rows)) if rows.anchor(index) not in kept_apart]
        if not keep:
            raise InputError(f"tasks.{name}: no training rows are left beside the probe set; lower probe.rows_per_task")
        cap = recipe.tasks[name].cap
        if cap and len(keep) > cap:
            keep = sorted(random.Random(f"{recipe.seed}/cap/{name}").sample(keep, cap))
        split[name] = TaskData(rows.select(keep), *held[name])
    return split


def _refuse_overlap(name: str, probe: TaskRows, tables: dict[str, TaskRows]) -> None:
    for table in tables.values():
        seen = table.anchors()
        for index in range(len(probe)):
            if probe.anchor(index) in seen:
                raise InputError(
                    f"tasks.{name}.probe_sources: probe row {probe.ids[index]} is in the training data of "
                    f"'{table.name}'; take it out of one of them"
                )


def _split(rows: TaskRows, probe: Probe, share: float) -> tuple[TaskRows, TaskRows]:
    """Two disjoint sets of rows, balanced over sources, one row an anchor; smaller for small tasks."""
    generator = random.Random(f"{probe.seed}/probe/{rows.name}")
    by_source: dict[str, list[int]] = defaultdict(list)
    order = list(range(len(rows)))
    generator.shuffle(order)
    seen: set[int] = set()
    for index in order:
        if rows.anchor(index) not in seen:
            seen.add(rows.anchor(index))
            by_source[rows.source_of(index)].append(index)
    wanted = probe.rows_per_task + probe.validation_rows_per_task
    total = min(wanted, int(len(seen) * share))
    chosen = _round_robin([members for _, members in sorted(by_source.items())], total)
    cut = round(total * probe.rows_per_task / wanted)
    if cut < 2 or total - cut < 2:
        raise InputError(f"tasks.{rows.name}: {len(rows)} rows are too few for a probe set; give more data")
    generator.shuffle(chosen)
    return rows.select(sorted(chosen[:cut])), rows.select(sorted(chosen[cut:]))


def _round_robin(lists: Sequence[Sequence[int]], count: int) -> list[int]:
    chosen: list[int] = []
    for depth in range(max((len(members) for members in lists), default=0)):
        for members in lists:
            if depth < len(members) and len(chosen) < count:
                chosen.append(members[depth])
    return chosen


def manifest(split: dict[str, TaskData], probe: Probe) -> dict[str, Any]:
    """What was held out, as row ids ("s0:17": source 0, row 17)."""
    return {
        "seed": probe.seed,
        "tasks": {
            name: {
                "probe": list(data.probe.ids),
                "validation": list(data.validation.ids),
                "training_rows": len(data.train) if isinstance(data.train, TaskRows) else None,  # a stream
            }
            for name, data in split.items()
        },
    }
