"""What is to be trained, as data: the rows, the steps, the settings, and a key that changes with any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scalemerge.checkpoints.revision import content_key
from scalemerge.data.held_out import anchors_of, hold_out, without
from scalemerge.data.plan import BatchPlan
from scalemerge.data.probe import TaskData
from scalemerge.data.sampling import allot, mixing_weights, steps_for
from scalemerge.data.streams import StreamedRows
from scalemerge.data.tasks import TaskRows
from scalemerge.recipe import Base, Recipe, Task, Training


@dataclass(frozen=True)
class Job:
    """One model to train: an expert (one task) or a joint baseline (all tasks, so many steps of each).

    held: rows of each task that are in no table, for evaluations during training; empty without `evaluate_every`.
    """

    name: str
    base: Base
    tasks: Mapping[str, Task]
    tables: Mapping[str, TaskRows | StreamedRows]
    steps: Mapping[str, int]
    settings: Training
    seed: int
    held: Mapping[str, TaskRows] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        return sum(self.steps.values())

    def plan(self) -> BatchPlan:
        return BatchPlan(
            self.tables,
            self.steps,
            self.settings.batch_size,
            self.seed,
            self.settings.samples_per_label,
            self.settings.length_buckets,
        )

    def key(self) -> str:
        """A hash of everything that decides the weights: settings, tasks, seed, and the rows themselves (of a stream,
        what can be known of them without reading it whole)."""
        rows = {name: table.key() for name, table in self.tables.items()}
        described = {
            "base": self.base.model_dump(),
            "tasks": {name: task.model_dump(exclude={"sources", "probe_sources"}) for name, task in self.tasks.items()},
            "rows": rows,
            "steps": dict(self.steps),
            "settings": self.settings.model_dump(exclude={"checkpoint_every", "engine", "prefetch", "trackers"}),
            "seed": self.seed,
            "held": {name: table.key() for name, table in self.held.items()},
        }
        return content_key(described)


def split_off(
    recipe: Recipe, data: Mapping[str, TaskData], tasks: Sequence[str], settings: Training
) -> tuple[dict[str, TaskRows | StreamedRows], dict[str, TaskRows]]:
    """The tables to train on and the rows held out of them, of so many tasks together.

    What is held out of one task is in no other's table either: the same query may occur in two.
    """
    tables = {name: data[name].train for name in tasks}
    if settings.evaluate_every is None:
        return tables, {}
    held = {name: hold_out(rows, settings.evaluation_rows, recipe.seed) for name, rows in tables.items()}
    anchors = anchors_of(held)
    return {name: without(rows, anchors) for name, rows in tables.items()}, held


def expert_batches(rows: TaskRows | StreamedRows, settings: Training) -> int:
    """Batches of one expert: passes over its table, or `max_steps` of a stream (load_tasks has made sure of it).

    `accumulate` batches make one step of the optimizer, which is what `max_steps` counts.
    """
    most = settings.max_steps * settings.accumulate if settings.max_steps else None
    if isinstance(rows, StreamedRows):
        assert most is not None
        return most
    return steps_for(len(rows), settings.batch_size, settings.epochs, most)


def expert_job(recipe: Recipe, data: Mapping[str, TaskData], name: str) -> Job:
    settings = recipe.training_of(name)
    tables, held = split_off(recipe, data, [name], settings)
    return Job(
        name=name,
        base=recipe.base,
        tasks={name: recipe.tasks[name]},
        tables=tables,
        steps={name: expert_batches(tables[name], settings)},
        settings=settings,
        seed=recipe.seed,
        held=held,
    )


def joint_job(recipe: Recipe, data: Mapping[str, TaskData], name: str) -> Job:
    """A joint baseline of equal total examples: as many as all experts together see.

    A stream has no size that a share could follow from: beside one, shares are equal (alpha 0) or given as weights.
    """
    joint, settings = recipe.joint[name], recipe.joint_training_of(name)
    tables, held = split_off(recipe, data, list(recipe.tasks), settings)
    examples = 0
    for task in recipe.tasks:
        own = recipe.training_of(task)
        examples += expert_batches(split_off(recipe, data, [task], own)[0][task], own) * own.batch_size
    weights = joint.weights or {task: config.weight for task, config in recipe.tasks.items() if config.weight}
    mixture = mixing_weights(
        {task: len(rows) if isinstance(rows, TaskRows) else 1 for task, rows in tables.items()},
        alpha=joint.alpha,
        cap=joint.cap,
        weights=weights or None,
    )
    steps = allot(mixture, max(1, round(examples / settings.batch_size)))
    return Job(
        name=name,
        base=recipe.base,
        tasks=dict(recipe.tasks),
        tables=tables,
        steps=steps,
        settings=settings,
        seed=recipe.seed,
        held=held,
    )
