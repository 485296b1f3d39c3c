"""The rows of a task: all its sources in one table, each row with an id and the fingerprints of its texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalemerge.data.sources import TEXT_ROLES, load_rows
from scalemerge.errors import InputError
from scalemerge.objectives import check_parameters
from scalemerge.recipe import Recipe, Source, Task

if TYPE_CHECKING:
    from datasets import Dataset


def fingerprint(text: str) -> int:
    """64 bits of a text, blind to case and white space."""
    normal = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


@dataclass
class TaskRows:
    """Rows of one task.

    data: columns by role (see scalemerge.data.sources). ids: "<source>:<row>" of each row. texts: the fingerprints of
    each row's texts, the anchor (query, sentence1, text) first. labels: label names, for labelled texts.
    """

    name: str
    kind: str
    data: Dataset
    ids: list[str]
    texts: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> TaskRows:
        return TaskRows(
            self.name,
            self.kind,
            self.data.select(indices),
            [self.ids[index] for index in indices],
            [self.texts[index] for index in indices],
        )

    def anchors(self) -> set[int]:
        """Fingerprints of whole rows for symmetric kinds and of the queries for the others: what "seen" means."""
        return {self.anchor(index) for index in range(len(self))}

    def anchor(self, index: int) -> int:
        texts = self.texts[index]
        return hash(tuple(sorted(texts))) if self.kind == "scored_pairs" else texts[0]

    def source_of(self, index: int) -> str:
        return self.ids[index].split(":", 1)[0]


def load_task(name: str, task: Task, sources: Sequence[Source], recipe: Recipe, field: str = "sources") -> TaskRows:
    """Read the sources of a task, check them, and put them into one table. Raises InputError."""
    from datasets import concatenate_datasets

    parts, ids = [], []
    for number, source in enumerate(sources):
        try:
            rows = load_rows(source, task.kind, data=recipe.data)
        except InputError as error:
            raise InputError(f"tasks.{name}.{field}.{number}: {error}") from None
        parts.append(rows)
        ids += [f"{field[0]}{number}:{row}" for row in rows["row"]]
    data = concatenate_datasets(parts)
    roles = TEXT_ROLES[task.kind]
    texts = [
        tuple(fingerprint(text) for text in row) for row in zip(*(list(data[role]) for role in roles), strict=True)
    ]
    if task.kind == "triplets":
        texts = [
            (*row, *(fingerprint(text) for text in negatives))
            for row, negatives in zip(texts, list(data["negatives"]), strict=True)
        ]
    rows_of_task = TaskRows(name, task.kind, data, ids, texts)
    _check_targets(rows_of_task)
    assert task.loss is not None
    check_parameters(task.loss.name, task.loss.parameters, f"tasks.{name}.loss.parameters")
    return rows_of_task


def _check_targets(rows: TaskRows) -> None:
    if rows.kind == "scored_pairs" and len(set(rows.data["score"])) < 2:
        raise InputError(f"tasks.{rows.name}: all scores are equal, so nothing can be ranked; give graded scores")
    if rows.kind == "labelled_texts":
        labels: Any = rows.data["label"]
        if len(set(labels)) < 2:
            raise InputError(f"tasks.{rows.name}: all rows have one label; give at least two")
