"""What is scored: tasks, their limits, suites. Plain data, so that listing a suite costs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Task type -> main metric, as mteb names it (its own default for the type).
METRICS = {
    "sts": "cosine_spearman",
    "pair_classification": "max_ap",
    "reranking": "map_at_1000",
    "classification": "accuracy",
    "clustering": "v_measure",
    "retrieval": "ndcg_at_10",
}
# A hub task's type and metric are known only after mteb is imported; tasks.resolve() fills them in.
HUB = "hub"


@dataclass(frozen=True)
class Options:
    """Limits of one task. None takes everything; caps are drawn with `seed` and so are the same everywhere.

    max_rows: rows of the scored split (drawn by label where there are labels).
    max_train_rows: rows of the split a classifier is trained on.
    max_queries, max_corpus: retrieval and reranking; a document relevant to a kept query is always kept,
        so a corpus can be larger than max_corpus, never smaller than its relevant part.
    samples_per_label, experiments: mteb's classification protocol; experiments also counts clustering runs.
    """

    max_rows: int | None = None
    max_train_rows: int | None = None
    max_queries: int | None = None
    max_corpus: int | None = None
    samples_per_label: int = 8
    experiments: int = 10
    seed: int = 42


@dataclass(frozen=True)
class EvaluationTask:
    """One scored data set: a folder of the shared layout, or (folder None) an mteb task by its name."""

    name: str
    type: str
    metric: str
    folder: Path | None
    split: str = "test"
    train_split: str | None = None
    options: Options = Options()

    def describe(self) -> dict[str, Any]:
        """What results.json says of a task."""
        return {"name": self.name, "type": self.type, "metric": self.metric}

    def settings(self) -> dict[str, Any]:
        """All that changes a score, beside the files' content and without the folder's place."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    name: str
    tasks: tuple[EvaluationTask, ...]

    def __iter__(self) -> Iterator[EvaluationTask]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def describe(self) -> dict[str, Any]:
        """What results.json says of a suite."""
        return {"name": self.name, "tasks": [task.describe() for task in self.tasks]}


def mteb_name(name: str) -> str:
    """mteb wants organization/model; the model part becomes a folder name."""
    return f"scalemerge/{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.') or 'model'}"
