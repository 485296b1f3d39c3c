"""Batches made ahead: order, errors in their place, leaving early, and what is counted as waiting."""

from __future__ import annotations

import threading
import time

import pytest

from scalemerge.training.feeding import Feeder


@pytest.mark.parametrize("depth", [0, 1, 2, 9])
def test_the_same_items_in_the_same_order(depth: int) -> None:
    asked: list[int] = []

    def make(number: int) -> int:
        asked.append(number)
        return number * number

    with Feeder(make, range(3, 9), depth) as feeder:
        assert [next(feeder) for _ in range(6)] == [9, 16, 25, 36, 49, 64]
        with pytest.raises(StopIteration):
            next(feeder)
    assert asked == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_where_the_item_would_have_come(depth: int) -> None:
    def make(number: int) -> int:
        if number == 3:
            raise ValueError("row 3 is bad")
        return number

    with Feeder(make, range(6), depth) as feeder:
        assert [next(feeder) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="row 3 is bad"):
            next(feeder)


def test_no_more_than_depth_are_made_ahead() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    with Feeder(make, range(100), 2) as feeder:
        next(feeder)
        time.sleep(0.5)
        assert 3 <= len(made) <= 4, "one given, two waiting, one in the thread's hands"


def test_leaving_while_the_thread_waits_for_room_ends_it() -> None:
    before = threading.active_count()
    with Feeder(lambda number: number, range(1000), 1) as feeder:
        next(feeder)
        time.sleep(0.3)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert threading.active_count() == before


def test_leaving_with_an_error_of_ones_own_ends_the_thread() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), Feeder(lambda number: number, range(1000), 3) as feeder:
        next(feeder)
        raise KeyError
    assert threading.active_count() == before


def test_waiting_is_what_the_consumer_waits() -> None:
    def slow(number: int) -> int:
        time.sleep(0.2)
        return number

    with Feeder(slow, range(2), 0) as feeder:
        next(feeder), next(feeder)
        assert 0.4 <= feeder.waited < 2
    with Feeder(slow, range(2), 2) as feeder:
        next(feeder)
        first = feeder.waited
        time.sleep(1)  # the second is made meanwhile
        next(feeder)
        assert feeder.waited - first < 0.15 < first
