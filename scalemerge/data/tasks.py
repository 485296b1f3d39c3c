"""The rows of a task: all its sources in one table, each row with an id and the fingerprints of its texts.

Ten million rows are ten million times whatever a row costs: ids are held by Arrow and fingerprints in one array of
64-bit numbers (together some 35 bytes a pair, a seventh of lists of Python strings and tuples).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar, overload

from scalemerge.data.sources import TEXT_ROLES, load_rows
from scalemerge.errors import InputError
from scalemerge.objectives import check_parameters
from scalemerge.recipe import Recipe, Source, Task

if TYPE_CHECKING:
    from datasets import Dataset

Item = TypeVar("Item")


def fingerprint(text: str) -> int:
    """64 bits of a text, blind to case and white space."""
    normal = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


class _Packed(Sequence[Item]):
    """A sequence that is equal to the list of its items."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[Item]) -> list[Item]:
        return [*self, *other]

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.item(each) for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.item(index % len(self))

    def item(self, index: int) -> Item:
        raise NotImplementedError


class Fingerprints(_Packed[tuple[int, ...]]):
    """Each row's fingerprints: `values` of all rows, row i from `starts[i]` to `starts[i + 1]`, or `width` a row."""

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        self.values, widths = array("Q"), array("I")
        for row in rows:
            self.values.extend(row)
            widths.append(len(row))
        self._count = len(widths)
        self._width = widths[0] if widths else 0
        ragged = any(width != self._width for width in widths)
        self._starts = array("Q", accumulate(widths, initial=0)) if ragged else None

    def __len__(self) -> int:
        return self._count

    def item(self, index: int) -> tuple[int, ...]:
        if self._starts is None:
            return tuple(self.values[index * self._width : (index + 1) * self._width])
        return tuple(self.values[self._starts[index] : self._starts[index + 1]])


class RowIds(_Packed[str]):
    def __init__(self, ids: Any) -> None:
        """ids: an Arrow array of strings, or the strings."""
        import pyarrow

        self.values = ids if isinstance(ids, pyarrow.Array) else pyarrow.array(ids, pyarrow.large_string())

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 10_000):
            yield from self.values[start : start + 10_000].to_pylist()

    def item(self, index: int) -> str:
        return str(self.values[index].as_py())


@dataclass
class TaskRows:
    """Rows of one task.

    data: columns by role (see scalemerge.data.sources). ids: "<source>:<row>" of each row. texts: the fingerprints of
    each row's texts, the anchor (query, sentence1, text) first. labels: label names, for labelled texts.
    """

    name: str
    kind: str
    data: Dataset
    ids: Sequence[str]
    texts: Sequence[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> str:
        return f"{len(self)} training rows"

    def select(self, indices: Sequence[int]) -> TaskRows:
        return TaskRows(
            self.name,
            self.kind,
            self.data.select(indices),
            RowIds([self.ids[index] for index in indices]),
            Fingerprints(self.texts[index] for index in indices),
        )

    def anchors(self) -> set[int]:
        """Fingerprints of whole rows for symmetric kinds and of the queries for the others: what "seen" means."""
        return {self.anchor(index) for index in range(len(self))}

    def anchor(self, index: int) -> int:
        texts = self.texts[index]
        return hash(tuple(sorted(texts))) if self.kind == "scored_pairs" else texts[0]

    def source_of(self, index: int) -> str:
        return self.ids[index].split(":", 1)[0]

    def lengths(self) -> array[int]:
        """Characters of each row's longest text."""
        lengths = array("I")
        for batch in self.data.iter(10_000):
            columns: list[list[int]] = [[len(text) for text in batch[role]] for role in TEXT_ROLES[self.kind]]
            if self.kind == "triplets":
                columns.append([max(map(len, texts), default=0) for texts in batch["negatives"]])
            lengths.extend(map(max, zip(*columns)) if len(columns) > 1 else columns[0])
        return lengths

    def key(self) -> str:
        """A hash of the rows: their ids and texts, in order."""
        digest = hashlib.sha256()
        for row_id, texts in zip(self.ids, self.texts, strict=True):
            digest.update(f"{row_id}\0{texts}\n".encode())
        return digest.hexdigest()[:16]


def load_task(name: str, task: Task, sources: Sequence[Source], recipe: Recipe, field: str = "sources") -> TaskRows:
    """Read the sources of a task, check them, and put them into one table. Raises InputError."""
    parts = []
    for number, source in enumerate(sources):
        try:
            parts.append(load_rows(source, task.kind, data=recipe.data))
        except InputError as error:
            raise InputError(f"tasks.{name}.{field}.{number}: {error}") from None
    rows = rows_of(name, task.kind, parts, field)
    check_rows(rows, task)
    return rows


def rows_of(name: str, kind: str, parts: Sequence[Dataset], field: str = "sources") -> TaskRows:
    """One table of the canonical rows of several sources, with ids and fingerprints."""
    from datasets import concatenate_datasets

    data = concatenate_datasets(list(parts))
    ids = RowIds([f"{field[0]}{number}:{row}" for number, part in enumerate(parts) for row in part["row"][:]])
    return TaskRows(name, kind, data, ids, Fingerprints(_fingerprints(data, kind)))


def _fingerprints(data: Dataset, kind: str) -> Iterator[list[int]]:
    for batch in data.iter(10_000):
        for number, texts in enumerate(zip(*(batch[role] for role in TEXT_ROLES[kind]), strict=True)):
            own = [fingerprint(text) for text in texts]
            yield own + [fingerprint(text) for text in batch["negatives"][number]] if kind == "triplets" else own


def check_rows(rows: TaskRows, task: Task) -> None:
    """Targets from which something can be learned, and a loss that takes the parameters given. Raises InputError."""
    if rows.kind == "scored_pairs" and len(set(rows.data["score"][:])) < 2:
        raise InputError(f"tasks.{rows.name}: all scores are equal, so nothing can be ranked; give graded scores")
    if rows.kind == "labelled_texts":
        labels: Any = rows.data["label"][:]
        if len(set(labels)) < 2:
            raise InputError(f"tasks.{rows.name}: all rows have one label; give at least two")
    assert task.loss is not None
    check_parameters(task.loss.name, task.loss.parameters, f"tasks.{rows.name}.loss.parameters")
