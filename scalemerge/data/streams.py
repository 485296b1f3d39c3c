"""Training data that never fits in memory: rows read in windows, from the beginning again at the end.

A window is at most `Source.window` rows of each source of the task: the windows' sizes are the mixture, and each source
starts over on its own when it has ended. A window ends with its source, so no row is twice in one.

Where a window begins is all that must be remembered: for each source how often it was read, the number of the row, and
what `datasets` calls the stream's state. Resuming there does not read earlier windows again; of the one file in which
the window begins `datasets` parses the part before it once more (without making Python rows of it), so many files of
moderate size resume sooner than a single one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scalemerge.checkpoints.revision import content_key
from scalemerge.data.sources import canonical, describe_files, no_rows_in, open_stream, table_of, take, typed
from scalemerge.data.tasks import TaskRows, check_rows, rows_of
from scalemerge.errors import InputError
from scalemerge.recipe import Recipe, Source, Task

if TYPE_CHECKING:
    from datasets import Dataset

Position = dict[str, Any]
"""Of one source: `epoch` (times it was read to its end), `row` (the number of the next), `stream` (datasets' state)."""


class RowStream:
    """One source, read window by window."""

    def __init__(self, source: Source, kind: str, data: str | None) -> None:
        self.source, self.kind, self._data = source, kind, data
        self.where, self._stream = open_stream(source, kind, data)
        self.start: Position = {"epoch": 0, "row": 0, "stream": _plain(self._stream.state_dict())}
        self._at: Position | None = None
        self._rows: Iterator[tuple[int, dict[str, Any]]] = iter(())

    def read(self, position: Position) -> tuple[Dataset, Position]:
        """The window that begins at a position, in the schema of the kind, and the position where it ends.

        Raises InputError naming file and row.
        """
        while True:
            if position != self._at:
                self._seek(position)
            self._at = None  # lost, should reading fail
            taken, count = take(self._rows, self.source, self.where, self.source.window)
            end = {
                "epoch": position["epoch"],
                "row": position["row"] + count,
                "stream": _plain(self._stream.state_dict()),
            }
            self._at = end
            if taken:
                return canonical(table_of(taken, self.where), self.source, self.kind, self.where), copy.deepcopy(end)
            if position["row"] == 0:
                raise no_rows_in(self.where, self.source)
            position = {**self.start, "epoch": position["epoch"] + 1}

    def _seek(self, position: Position) -> None:
        self._stream.load_state_dict(copy.deepcopy(position["stream"]))
        self._rows = enumerate(iter(self._stream), position["row"])

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source.model_dump(exclude={"path"}),
            "files": describe_files(self.source, self._data) or self.source.path,
        }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A state as JSON gives it back."""
    return json.loads(json.dumps(state))


class StreamedRows:
    """The rows of a task whose sources are streams. It has no length.

    first: the first window, without the rows held out. held_out: fingerprints (see TaskRows.anchor) of rows that are
    never given.
    """

    def __init__(self, name: str, kind: str, streams: Sequence[RowStream], held_out: frozenset[int] = frozenset()):
        self.name, self.kind, self.streams, self.held_out = name, kind, streams, held_out
        self._first: tuple[TaskRows, list[Position]] | None = None

    @property
    def window(self) -> int:
        """The rows of a window at most."""
        return sum(stream.source.window for stream in self.streams)

    @property
    def size(self) -> str:
        return f"a stream of training rows in windows of {self.window}"

    @property
    def start(self) -> list[Position]:
        return [stream.start for stream in self.streams]

    @property
    def first(self) -> TaskRows:
        return self.read(self.start)[0]

    def without(self, anchors: set[int]) -> StreamedRows:
        """The same rows but for those of these fingerprints as well."""
        fewer = StreamedRows(self.name, self.kind, self.streams, self.held_out | anchors)
        if self._first:
            fewer._first = (fewer._keep(self._first[0]), self._first[1])
        return fewer

    def read(self, positions: Sequence[Position]) -> tuple[TaskRows, list[Position]]:
        """The window that begins at a position, without the rows held out, and where it ends. Raises InputError.

        The first window is kept: what checks the task, splits off its probe set and makes its key reads it once.
        """
        if positions != self.start:
            return self._read(positions)
        if self._first is None:
            self._first = self._read(positions)
        return self._first

    def _read(self, positions: Sequence[Position]) -> tuple[TaskRows, list[Position]]:
        parts, ends = [], []
        for number, (stream, position) in enumerate(zip(self.streams, positions, strict=True)):
            try:
                part, end = stream.read(position)
            except InputError as error:
                raise InputError(f"tasks.{self.name}.sources.{number}: {error}") from None
            parts.append(part)
            ends.append(end)
        return self._keep(rows_of(self.name, self.kind, parts)), ends

    def _keep(self, rows: TaskRows) -> TaskRows:
        keep = [index for index in range(len(rows)) if rows.anchor(index) not in self.held_out]
        return rows if len(keep) == len(rows) else restore_rows(self, pack_rows(rows, keep))

    def key(self) -> str:
        """A hash of what can be known of the rows without reading them all: the sources' description, the files' names,
        sizes and ends, the rows of the first window, and what is held out."""
        described = [stream.describe() for stream in self.streams]
        return content_key([described, self.first.key(), sorted(self.held_out)])


def pack_rows(rows: TaskRows, indices: Sequence[int]) -> dict[str, Any]:
    """Some rows as JSON: enough for `restore_rows`."""
    table = rows.data[list(indices)]
    ids = [rows.ids[index] for index in indices]
    return {"ids": ids, "columns": {name: list(values) for name, values in table.items()}}


def restore_rows(like: StreamedRows, packed: Mapping[str, Any]) -> TaskRows:
    made = rows_of(like.name, like.kind, [typed(dict(packed["columns"]))])
    made.ids = packed["ids"]
    return made


def open_task(name: str, task: Task, recipe: Recipe) -> StreamedRows:
    """A task whose sources are streams, its first window read and checked. Raises InputError."""
    streams = []
    for number, source in enumerate(task.sources):
        try:
            streams.append(RowStream(source, task.kind, recipe.data))
        except InputError as error:
            raise InputError(f"tasks.{name}.sources.{number}: {error}") from None
    rows = StreamedRows(name, task.kind, streams)
    check_rows(rows.first, task)
    return rows


def is_streamed(task: Task) -> bool:
    return any(source.streamed for source in task.sources)


def check_streamed(recipe: Recipe) -> None:
    """Refuse what a stream, whose length is not known, cannot do. Raises InputError before anything is read."""
    streamed = [name for name, task in recipe.tasks.items() if is_streamed(task)]
    for name in streamed:
        task = recipe.tasks[name]
        for number, source in enumerate(task.sources):
            if not source.streamed:
                raise InputError(
                    f"tasks.{name}.sources.{number}: a table beside a stream; stream all sources of the task "
                    "(streaming without 'limit') or none"
                )
        if task.cap is not None:
            raise InputError(f"tasks.{name}.cap: a stream cannot be capped; give its sources a 'limit'")
        if recipe.training_of(name).max_steps is None:
            raise InputError(
                f"tasks.{name}: a stream has no length to count epochs by; set max_steps under tasks.{name}.training "
                "or training"
            )
    for name, joint in recipe.joint.items():
        weighted = joint.weights or any(task.weight for task in recipe.tasks.values())
        if streamed and not weighted and joint.alpha != 0:
            raise InputError(
                f"joint.{name}: task '{streamed[0]}' is a stream, so no share follows from its size; give weights, or "
                "alpha: 0 for equal shares"
            )
