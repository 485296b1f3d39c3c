"""What is to be trained, as data: the rows, the steps, the settings, and a key that changes with any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scalemerge.checkpoints.revision import content_key
from scalemerge.data.probe import TaskData
from scalemerge.data.sampling import PlannedBatch, allot, mixing_weights, plan_batches, steps_for
from scalemerge.data.tasks import TaskRows
from scalemerge.recipe import Base, Recipe, Task, Training


@dataclass(frozen=True)
class Job:
    """One model to train: an expert (one task) or a joint baseline (all tasks, so many steps of each)."""

    name: str
    base: Base
    tasks: Mapping[str, Task]
    tables: Mapping[str, TaskRows]
    steps: Mapping[str, int]
    settings: Training
    seed: int

    @property
    def total_steps(self) -> int:
        return sum(self.steps.values())

    def plan(self) -> list[PlannedBatch]:
        return plan_batches(
            self.tables, self.steps, self.settings.batch_size, self.seed, self.settings.samples_per_label
        )

    def key(self) -> str:
        """A hash of everything that decides the weights: settings, tasks, seed, and the rows themselves."""
        rows = {name: content_key([table.ids, table.texts]) for name, table in self.tables.items()}
        described = {
            "base": self.base.model_dump(),
            "tasks": {name: task.model_dump(exclude={"sources", "probe_sources"}) for name, task in self.tasks.items()},
            "rows": rows,
            "steps": dict(self.steps),
            "settings": self.settings.model_dump(exclude={"checkpoint_every", "engine"}),
            "seed": self.seed,
        }
        return content_key(described)


def expert_steps(recipe: Recipe, data: Mapping[str, TaskData], name: str) -> int:
    settings = recipe.training_of(name)
    return steps_for(len(data[name].train), settings.batch_size, settings.epochs, settings.max_steps)


def expert_job(recipe: Recipe, data: Mapping[str, TaskData], name: str) -> Job:
    return Job(
        name=name,
        base=recipe.base,
        tasks={name: recipe.tasks[name]},
        tables={name: data[name].train},
        steps={name: expert_steps(recipe, data, name)},
        settings=recipe.training_of(name),
        seed=recipe.seed,
    )


def joint_job(recipe: Recipe, data: Mapping[str, TaskData], name: str) -> Job:
    """A joint baseline of equal total examples: as many as all experts together see."""
    joint, settings = recipe.joint[name], recipe.joint_training_of(name)
    examples = sum(expert_steps(recipe, data, task) * recipe.training_of(task).batch_size for task in recipe.tasks)
    weights = joint.weights or {task: config.weight for task, config in recipe.tasks.items() if config.weight}
    mixture = mixing_weights(
        {task: len(data[task].train) for task in recipe.tasks},
        alpha=joint.alpha,
        cap=joint.cap,
        weights=weights or None,
    )
    steps = allot(mixture, max(1, round(examples / settings.batch_size)))
    return Job(
        name=name,
        base=recipe.base,
        tasks=dict(recipe.tasks),
        tables={task: data[task].train for task in recipe.tasks},
        steps=steps,
        settings=settings,
        seed=recipe.seed,
    )
