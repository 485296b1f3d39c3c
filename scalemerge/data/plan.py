"""The batches of a run in order, made as they are asked for.

The plan is a pure function of data, settings and seed, so any number of ranks sees the same global batches. For tables
nothing must be saved to resume: row numbers are made again from the seed (5 million rows: seconds). For streams the
state is where the window of the next batch begins, and the few rows that the window before left over.
"""

from __future__ import annotations

import random
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from scalemerge.data.sampling import Batch, BatchCutter, batch_stream, cannot_fill
from scalemerge.data.streams import Position, StreamedRows, pack_rows, restore_rows
from scalemerge.data.tasks import Fingerprints, RowIds, TaskRows

REMEMBERED = 4096
"""How many batches behind the last one fetched a state can be had: more than are ever tokenized ahead."""


@dataclass(frozen=True, eq=False)
class PlannedRows:
    """One global batch: `rows` are row numbers of `table`."""

    task: str
    table: TaskRows
    rows: Batch


class BatchPlan:
    """`steps[task]` batches of each task, in a seeded order.

    Batches are fetched in increasing order from one thread; `state` may be called from another one meanwhile.
    """

    def __init__(
        self,
        tables: Mapping[str, TaskRows | StreamedRows],
        steps: Mapping[str, int],
        batch_size: int,
        seed: int,
        samples_per_label: int = 4,
        length_buckets: int = 1,
    ) -> None:
        self._names = [task for task, count in sorted(steps.items()) if count]
        order = [number for number, task in enumerate(self._names) for _ in range(steps[task])]
        if len(self._names) > 1:
            random.Random(f"{seed}/order").shuffle(order)
        self._order = np.array(order, dtype=np.uint16)
        cut = (batch_size, seed, samples_per_label, length_buckets)
        self._tasks: list[_TableBatches | _StreamBatches] = []
        for task in self._names:
            rows = tables[task]
            self._tasks.append(
                _StreamBatches(rows, *cut) if isinstance(rows, StreamedRows) else _TableBatches(rows, *cut)
            )

    def __len__(self) -> int:
        return len(self._order)

    def task(self, number: int) -> str:
        """The task of a batch, without making the batch."""
        return self._names[self._order[number]]

    def fetch(self, number: int) -> PlannedRows:
        """The batch of a number. Raises InputError where a stream's rows are bad, or no batch can be filled."""
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        which = self._order[number]
        return self._tasks[which].fetch(self._before(number, which))

    def __iter__(self) -> Iterator[PlannedRows]:
        return (self.fetch(number) for number in range(len(self)))

    def state(self, number: int) -> dict[str, Any]:
        """What `restore` needs to go on at a batch, as JSON; {} where there are no streams."""
        streams = {
            name: batches.state(self._before(number, which))
            for which, (name, batches) in enumerate(zip(self._names, self._tasks, strict=True))
            if isinstance(batches, _StreamBatches)
        }
        return {"streams": streams} if streams else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was called for: the batch of that number and all later ones can be fetched."""
        for name, of_task in state.get("streams", {}).items():
            batches = self._tasks[self._names.index(name)]
            assert isinstance(batches, _StreamBatches)
            batches.restore(of_task)

    def _before(self, number: int, which: int) -> int:
        """How many of the first `number` batches are of a task."""
        return int(np.count_nonzero(self._order[:number] == which))


class _TableBatches:
    def __init__(self, rows: TaskRows, size: int, seed: int, samples_per_label: int, length_buckets: int) -> None:
        self.rows, self._cut = rows, (size, seed, samples_per_label, length_buckets)
        self._batches: Iterator[Batch] = iter(())
        self._next = -1
        self._last: Batch = ()

    def fetch(self, number: int) -> PlannedRows:
        if self._next < 0 or number < self._next - 1:
            self._batches, self._next = batch_stream(self.rows, *self._cut), 0
        while self._next <= number:
            self._last = next(self._batches)
            self._next += 1
        return PlannedRows(self.rows.name, self.rows, self._last)


@dataclass
class _Window:
    """A window's beginning: its number, how many batches come before, and the rows left over before it."""

    number: int
    before: int
    positions: list[Position]
    carried: dict[str, Any] | None


class _StreamBatches:
    """Windows one after another, each cut into batches like a small table.

    At most a window's worth of rows is carried into the next window; texts so frequent that more are left over cannot
    all be used, as each may be in a batch once.
    """

    def __init__(self, rows: StreamedRows, size: int, seed: int, samples_per_label: int, length_buckets: int) -> None:
        self.rows, self._size, self._seed = rows, size, seed
        self._settings = (samples_per_label, length_buckets)
        self._most_carried = max(rows.window, 4 * size)
        self._lock = threading.Lock()  # over the windows known, which `state` reads from another thread
        self.restore({"number": 0, "before": 0, "positions": rows.start, "carried": None})

    def restore(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            self._known = [_Window(**state)]
        self._table: TaskRows | None = None
        self._idle = [0] * len(self.rows.streams)

    def state(self, number: int) -> dict[str, Any]:
        with self._lock:
            window = self._known[self._window_of(number)]
        return dict(vars(window))

    def _window_of(self, number: int) -> int:
        found = bisect_right([window.before for window in self._known], number) - 1
        if found < 0:
            raise ValueError(f"batch {number} of task {self.rows.name} was left behind; restore its state")
        return found

    def fetch(self, number: int) -> PlannedRows:
        with self._lock:
            found = self._window_of(number)
            window = self._known[found]
            del self._known[found + 1 :]  # gone back: the later windows follow again
        if self._table is None or window is not self._window:
            self._open(window)
        while number >= self._window.before + len(self._batches):
            self._advance()
        assert self._table is not None
        return PlannedRows(self.rows.name, self._table, self._batches[number - self._window.before])

    def _open(self, window: _Window) -> None:
        """Read a window and cut it: the rows carried first, the new ones shuffled by seed and window number."""
        from datasets import concatenate_datasets

        new, self._ends = self.rows.read(window.positions)
        table, count = new, 0
        if window.carried:
            carried = restore_rows(self.rows, window.carried)
            count = len(carried)
            data = concatenate_datasets([carried.data, new.data])
            texts = Fingerprints(chain(carried.texts, new.texts))
            table = TaskRows(self.rows.name, self.rows.kind, data, RowIds([*carried.ids, *new.ids]), texts)
        generator = random.Random(f"{self._seed}/{self.rows.name}/window/{window.number}")
        batches = BatchCutter(table, self._size, generator, *self._settings).cut(range(count), range(count, len(table)))
        self._window, self._table, self._batches = window, table, []
        try:
            while True:
                self._batches.append(next(batches))
        except StopIteration as end:
            self._left: Sequence[int] = end.value

    def _advance(self) -> None:
        """Go to the next window. Raises InputError when a whole pass over the sources has not filled a batch."""
        window, table = self._window, self._table
        assert table is not None
        begun = [end["epoch"] - start["epoch"] for start, end in zip(window.positions, self._ends, strict=True)]
        self._idle = [0] * len(begun) if self._batches else [a + b for a, b in zip(self._idle, begun, strict=True)]
        if not self._batches and (len(self._left) >= self._most_carried or min(self._idle) > 1):
            raise cannot_fill(self.rows.name, self._size, len(self._left))
        left = self._left[: self._most_carried]
        following = _Window(
            window.number + 1,
            window.before + len(self._batches),
            self._ends,
            pack_rows(table, left) if left else None,
        )
        with self._lock:
            self._known.append(following)
            while len(self._known) > 1 and self._known[1].before <= following.before - REMEMBERED:
                del self._known[0]
        self._open(following)
