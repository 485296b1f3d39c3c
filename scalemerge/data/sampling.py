"""How rows are cut into batches, and how many batches each task gets.

Batches are task-homogeneous, and no text occurs twice in a batch of in-batch negatives (it would be its own negative).
Everything is a pure function of data, settings and seed; batches are made as they are asked for, and hold row numbers.
"""

from __future__ import annotations

import random
from array import array
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, MutableSequence, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain

from scalemerge.data.tasks import Fingerprints, TaskRows
from scalemerge.errors import InputError

Batch = tuple[int, ...]


def batch_stream(
    rows: TaskRows, batch_size: int, seed: int, samples_per_label: int = 4, length_buckets: int = 1
) -> Iterator[Batch]:
    """Endless full batches: each pass over the data in a new seeded order, leftovers carried into the next pass."""
    generator = random.Random(f"{seed}/{rows.name}")
    cutter = BatchCutter(rows, batch_size, generator, samples_per_label, length_buckets)
    carried: Sequence[int] = ()
    while True:
        made = 0
        batches = cutter.cut(carried, range(len(rows)))
        try:
            while True:
                yield next(batches)
                made += 1
        except StopIteration as end:
            carried = end.value
        if not made:
            raise cannot_fill(rows.name, batch_size, len(rows))


def cannot_fill(task: str, batch_size: int, rows: int) -> InputError:
    return InputError(
        f"tasks.{task}: cannot fill a batch of {batch_size} with different texts from {rows} rows; "
        "lower batch_size or give more data"
    )


class BatchCutter:
    """Cuts rows of a table into batches of `size`; `generator` gives the order.

    samples_per_label: texts of a label that stay together (labelled texts). length_buckets: batches are cut from so
    many batches' rows sorted by length, and come in a seeded order within these; 1: by chance alone.
    """

    def __init__(
        self,
        rows: TaskRows,
        size: int,
        generator: random.Random,
        samples_per_label: int = 4,
        length_buckets: int = 1,
    ) -> None:
        self.rows, self.size, self.generator = rows, size, generator
        self.samples_per_label, self.length_buckets = samples_per_label, length_buckets
        self.labels = rows.data["label"][:] if rows.kind == "labelled_texts" else None
        self.lengths = rows.lengths() if length_buckets > 1 else None

    def cut(self, carried: Sequence[int], new: range) -> Generator[Batch, None, list[int]]:
        """The batches of `carried` rows, as they are, and then of `new` ones, shuffled. Returns what is left over."""
        order: MutableSequence[int] = array("q", new)  # 8 bytes a row; shuffled like a list
        self.generator.shuffle(order)
        units: Iterable[Sequence[int]] | None = self._clumps(order) if self.labels else None
        if self.lengths is None:
            rows = order if units is None else chain.from_iterable(units)
            return (yield from self._fill(chain(carried, rows)))
        return (yield from self._fill_by_length(carried, ([row] for row in order) if units is None else units))

    def _clumps(self, order: Iterable[int]) -> list[list[int]]:
        """Rows in groups of one label, in a random order of the groups."""
        assert self.labels is not None
        by_label: dict[str, list[int]] = defaultdict(list)
        for row in order:
            by_label[self.labels[row]].append(row)
        clumps: list[list[int]] = []
        count = self.samples_per_label
        for _, members in sorted(by_label.items()):
            parts = [members[start : start + count] for start in range(0, len(members), count)]
            if len(parts) > 1 and len(parts[-1]) == 1:  # a text alone has no positive
                parts[-2:] = [parts[-2] + parts[-1]]
            clumps += parts
        self.generator.shuffle(clumps)
        return clumps

    def _fill_by_length(
        self, carried: Sequence[int], units: Iterable[Sequence[int]]
    ) -> Generator[Batch, None, list[int]]:
        """`_fill` of one bucket after another. What is left over of a bucket sorted upwards is its longest rows: so the
        next one is sorted downwards, and they come first."""
        lengths = self.lengths
        assert lengths is not None

        def mean(rows: Sequence[int]) -> float:
            return sum(lengths[row] for row in rows) / max(1, len(rows))

        more = iter(units)
        while True:
            bucket: list[Sequence[int]] = []
            count = len(carried)
            wanted = max(self.size * self.length_buckets, count + self.size)
            while count < wanted and (unit := next(more, None)) is not None:
                bucket.append(unit)
                count += len(unit)
            downwards = mean(carried) > mean(list(chain.from_iterable(bucket)))
            first: Sequence[int] = carried
            if self.labels is None:  # else the rest of a label would come between others
                bucket += [[row] for row in carried]
                first = ()
            bucket.sort(key=lambda unit: max(lengths[row] for row in unit), reverse=downwards)
            full: list[Batch] = []
            filling = self._fill(chain(first, *bucket))
            try:
                while True:
                    full.append(next(filling))
            except StopIteration as end:
                carried = end.value
            self.generator.shuffle(full)
            yield from full
            if count < wanted:
                return list(carried)

    def _fill(self, order: Iterable[int]) -> Generator[Batch, None, list[int]]:
        """Batches of exactly `size` rows without a repeated text; a row that does not fit waits for the next batch."""
        texts = self.rows.texts
        texts_of = texts.item if isinstance(texts, Fingerprints) else texts.__getitem__
        unique = self.rows.kind != "scored_pairs"
        waiting = _Waiting()
        rows = iter(order)
        while True:
            batch, seen = waiting.take(self.size)
            while len(batch) < self.size and (row := next(rows, None)) is not None:
                if unique:
                    own = texts_of(row)
                    if not seen.isdisjoint(own):
                        waiting.add(row, own, seen)
                        continue
                    seen.update(own)
                batch.append(row)
            if len(batch) < self.size:
                return batch + waiting.rows()
            yield tuple(batch)


class _Waiting:
    """Rows that wait for a batch without one of their texts, first come first served.

    A text in every tenth row would have each batch look through all rows of that text, millions of them. So rows lie
    under the text that last kept them out, and a text that is in the batch is passed over with all its rows.
    """

    def __init__(self) -> None:
        self._by_text: dict[int, list[tuple[int, int, Sequence[int]]]] = defaultdict(list)  # heaps: turn, row, texts
        self._turns = 0

    def add(self, row: int, own: Sequence[int], seen: set[int]) -> None:
        self._put((self._turns, row, own), seen)
        self._turns += 1

    def _put(self, entry: tuple[int, int, Sequence[int]], seen: set[int]) -> None:
        heappush(self._by_text[next(text for text in entry[2] if text in seen)], entry)

    def take(self, size: int) -> tuple[list[int], set[int]]:
        """The start of a batch: at most `size` rows in the order they came, and their texts."""
        batch: list[int] = []
        seen: set[int] = set()
        heads = [(entries[0][0], text) for text, entries in self._by_text.items()]
        heapify(heads)
        while heads and len(batch) < size:
            _, text = heappop(heads)
            if text in seen:
                continue
            entries = self._by_text[text]
            entry = heappop(entries)
            if seen.isdisjoint(entry[2]):
                batch.append(entry[1])
                seen.update(entry[2])
            else:
                self._put(entry, seen)
                if entries:
                    heappush(heads, (entries[0][0], text))
            if not entries:
                del self._by_text[text]
        return batch, seen

    def rows(self) -> list[int]:
        return [row for _, row, _ in sorted(entry for entries in self._by_text.values() for entry in entries)]


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


def steps_for(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps for so many passes over the data; at least one."""
    steps = max(1, round(rows * epochs / batch_size))
    return min(steps, max_steps) if max_steps else steps
