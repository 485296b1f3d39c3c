"""Rows held out of training, to see during training how a model does on what it has not seen.

Which rows are held out follows from their fingerprints and the seed alone: every job of a recipe that asks for as many
holds out the same ones, a larger number holds out those of a smaller one too, and rows added to a table hardly change
the choice. These are not the probe set's rows, which have left the tables before.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from scalemerge.data.streams import StreamedRows
from scalemerge.data.tasks import TaskRows
from scalemerge.errors import InputError

LARGEST_SHARE = 0.25
"""Of a table's rows, or of those of a stream's first window, that may leave training at most."""


def hold_out(rows: TaskRows | StreamedRows, count: int, seed: int) -> TaskRows:
    """`count` rows of a task, one an anchor; fewer of a small table. Of a stream: rows of its first window.

    Labelled texts come in pairs of one label, as a text alone has no neighbour to find. Raises InputError where too few
    are left to measure anything.
    """
    table = rows.first if isinstance(rows, StreamedRows) else rows
    anchors = np.fromiter((table.anchor(row) % 2**64 for row in range(len(table))), np.uint64, len(table))
    unique, first, copies = np.unique(anchors, return_index=True, return_counts=True)
    # Fingerprints are random numbers: times an odd one, modulo 2^64, they are another order.
    order = np.argsort(unique * np.uint64(random.Random(f"{seed}/held out").getrandbits(64) | 1), kind="stable")
    most = int(len(table) * LARGEST_SHARE)
    chosen: list[int] = []
    left = most
    for group in _groups(table, first[order].tolist(), copies[order].tolist()):
        rows_of_group = sum(size for _, size in group)
        if len(chosen) + len(group) > count:
            break
        if rows_of_group <= left:
            chosen += [row for row, _ in group]
            left -= rows_of_group
    held = table.select(chosen)
    _require_measurable(held, len(table))
    return held


def _groups(table: TaskRows, rows: Sequence[int], copies: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Rows, each with the number of rows of its anchor, in the order given: alone, or in pairs of a label."""
    if table.kind != "labelled_texts":
        yield from ([pair] for pair in zip(rows, copies, strict=True))
        return
    labels, waiting = list(table.data["label"]), defaultdict[str, list[tuple[int, int]]](list)
    for row, size in zip(rows, copies, strict=True):
        of_label = waiting[labels[row]]
        of_label.append((row, size))
        if len(of_label) == 2:
            yield of_label.copy()
            of_label.clear()


def _require_measurable(held: TaskRows, total: int) -> None:
    remedy = "give more data or raise evaluation_rows, or train without evaluate_every"
    if len(held) < 2:
        raise InputError(f"tasks.{held.name}: {total} rows are too few to hold some out for evaluation; {remedy}")
    if held.kind == "scored_pairs" and len(set(held.data["score"])) < 2:
        raise InputError(
            f"tasks.{held.name}: the {len(held)} rows held out for evaluation have one score only; {remedy}"
        )


def anchors_of(held: Mapping[str, TaskRows]) -> set[int]:
    return set().union(*(rows.anchors() for rows in held.values()))


def without(rows: TaskRows | StreamedRows, anchors: set[int]) -> TaskRows | StreamedRows:
    """The rows that are left for training. Raises InputError where none is."""
    if isinstance(rows, StreamedRows):
        return rows.without(anchors) if anchors else rows
    keep = [row for row in range(len(rows)) if rows.anchor(row) not in anchors]
    if not keep:
        raise InputError(f"tasks.{rows.name}: no training rows are left beside those held out; lower evaluation_rows")
    return rows if len(keep) == len(rows) else rows.select(keep)
