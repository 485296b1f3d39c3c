"""Batches made ahead of the step that needs them: fetched and tokenized by a thread while the model computes.

A thread is enough: reading rows is I/O, and fast tokenizers work outside the interpreter's lock on threads of their
own. What is fed, and in what order, does not depend on it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Feeder(Generic[T]):
    """`with Feeder(make, range(3, 9), depth=2) as feeder: batch = next(feeder)`: make(3), make(4) ... in order.

    depth: how many are made ahead; 0 makes each when it is asked for. waited: seconds the consumer has waited in all.
    An error in `make` is raised where the item would have come.
    """

    def __init__(self, make: Callable[[int], T], numbers: range, depth: int) -> None:
        self._make, self._numbers, self._depth = make, numbers, depth
        self.waited = 0.0

    def __enter__(self) -> Feeder[T]:
        self._items = self._ahead() if self._depth else map(self._make, self._numbers)
        return self

    def __next__(self) -> T:
        began = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.waited += time.monotonic() - began

    def __exit__(self, *_: object) -> None:
        if isinstance(self._items, Iterator) and hasattr(self._items, "close"):
            self._items.close()

    def _ahead(self) -> Iterator[T]:
        made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(self._depth)
        stop = threading.Event()

        def put(item: tuple[T | None, BaseException | None]) -> None:
            while not stop.is_set():
                try:
                    made.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for number in self._numbers:
                    if stop.is_set():
                        return
                    put((self._make(number), None))
            except BaseException as error:
                put((None, error))

        thread = threading.Thread(target=work, daemon=True, name="scalemerge-feeder")
        thread.start()
        try:
            for _ in self._numbers:
                item, error = made.get()
                if error is not None:
                    raise error
                yield item  # type: ignore[misc]
        finally:
            stop.set()
            thread.join(timeout=10)
