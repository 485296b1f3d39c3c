"""Which rows go into which batch: properties of the plan."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalemerge.data.sampling import allot, batch_stream, mixing_weights, plan_batches, steps_for
from scalemerge.data.tasks import TaskRows, fingerprint
from scalemerge.errors import InputError


def table(texts: list[tuple[str, ...]], kind: str = "pairs", labels: list[str] | None = None) -> TaskRows:
    from datasets import Dataset

    data = Dataset.from_dict({"label": labels or [""] * len(texts)})
    prints = [tuple(fingerprint(text) for text in row) for row in texts]
    return TaskRows("t", kind, data, [f"s0:{n}" for n in range(len(texts))], prints)


def distinct(count: int, kind: str = "pairs", labels: list[str] | None = None) -> TaskRows:
    width = 1 if kind == "labelled_texts" else 2
    return table([tuple(f"{side}{row}" for side in "ab"[:width]) for row in range(count)], kind, labels)


def batches(rows: TaskRows, size: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    return list(itertools.islice(batch_stream(rows, size, seed), count))


@given(
    texts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=4, max_size=40),
    size=st.integers(2, 5),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["pairs", "triplets", "retrieval"]),
)
def test_no_text_twice_in_a_batch(texts, size, seed, kind) -> None:
    """Queries that are another row's positive, and the same row in two passes, included; every batch is full."""
    rows = table([(f"t{a}", f"t{b}") for a, b in texts], kind)
    try:
        made = batches(rows, size, 12, seed)
    except InputError as error:
        assert "cannot fill a batch" in str(error)
        return
    for batch in made:
        assert len(batch) == size == len(set(batch))
        seen = [text for row in batch for text in set(rows.texts[row])]
        assert len(seen) == len(set(seen))


@given(count=st.integers(2, 50), size=st.integers(2, 10), passes=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_row_before_any_a_second_time(count, size, passes, seed) -> None:
    """With different texts: after k passes' worth of batches, every row was used k times, give or take one batch."""
    assume(size <= count)
    made = batches(distinct(count), size, passes * count // size, seed)
    used = Counter(row for batch in made for row in batch)
    assert set(used.values()) <= {passes - 1, passes, passes + 1}
    first = [row for batch in made[: count // size] for row in batch]
    assert len(first) == len(set(first)), "the first pass repeats no row"
    assert (
        set(range(count)) - set(first) <= {row for batch in made[count // size :][:2] for row in batch} or passes == 1
    )


@given(seed=st.integers(0, 2**40), count=st.integers(8, 40))
def test_deterministic_and_seeded(seed, count) -> None:
    rows = distinct(count)
    assert batches(rows, 4, 6, seed) == batches(rows, 4, 6, seed)
    assert any(batches(rows, 4, 6, seed) != batches(rows, 4, 6, seed + step) for step in (1, 2))


@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=12),
    size=st.integers(3, 12),
    samples=st.integers(2, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_labelled_batches_hold_two_of_a_label(sizes, size, samples, seed) -> None:
    """Every batch of the first pass has a positive pair, when every label has two texts."""
    labels = [str(label) for label, count in enumerate(sizes) for _ in range(count)]
    assume(size <= len(labels))
    rows = distinct(len(labels), "labelled_texts", labels)
    for batch in itertools.islice(batch_stream(rows, size, seed, samples), len(labels) // size):
        assert max(Counter(labels[row] for row in batch).values()) >= 2


def test_labelled_batches_hold_several_labels() -> None:
    """Clumps of 4, not of a whole label: a batch of one label alone would teach nothing."""
    labels = [str(row % 4) for row in range(80)]
    made = batches(distinct(80, "labelled_texts", labels), 16, 20)
    assert all(len({labels[row] for row in batch}) >= 2 for batch in made)


def test_scored_pairs_may_share_texts() -> None:
    """CoSENT has no in-batch negatives: the same sentence in two pairs is no false negative."""
    rows = table([("same", str(n)) for n in range(6)], "scored_pairs")
    assert sorted(batches(rows, 6, 1)[0]) == list(range(6))


def test_a_batch_that_cannot_be_filled() -> None:
    rows = table([("a", "b")] * 10)
    with pytest.raises(InputError, match=r"tasks\.t: cannot fill a batch of 2 .* from 10 rows; lower batch_size"):
        next(batch_stream(rows, 2, 0))
    with pytest.raises(InputError, match="cannot fill a batch of 11"):
        next(batch_stream(distinct(10), 11, 0))


# ---- mixing ------------------------------------------------------------------------------------------------------

SIZES = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(1, 10**7), min_size=1, max_size=6)


@given(sizes=SIZES, alpha=st.floats(0, 50), cap=st.none() | st.integers(1, 10**6))
def test_mixing_weights_sum_to_one(sizes, alpha, cap) -> None:
    weights = mixing_weights(sizes, alpha=alpha, cap=cap)
    assert weights.keys() == sizes.keys()
    assert sum(weights.values()) == pytest.approx(1)
    order = sorted(sizes, key=sizes.__getitem__)
    assert all(weights[a] <= weights[b] + 1e-12 for a, b in itertools.pairwise(order)), "larger data, larger share"


@given(sizes=SIZES)
def test_mixing_weights_at_both_ends(sizes) -> None:
    total = sum(sizes.values())
    for task, weight in mixing_weights(sizes, alpha=1.0).items():
        assert weight == pytest.approx(sizes[task] / total)
    for weight in mixing_weights(sizes, alpha=0.0).values():
        assert weight == pytest.approx(1 / len(sizes))


@given(sizes=SIZES, alpha=st.floats(0.1, 3))
def test_mixing_ratios_are_powers(sizes, alpha) -> None:
    weights = mixing_weights(sizes, alpha=alpha)
    for a, b in itertools.combinations(sizes, 2):
        assert weights[a] * sizes[b] ** alpha == pytest.approx(weights[b] * sizes[a] ** alpha)


def test_caps() -> None:
    sizes = {"big": 1000, "small": 100}
    assert mixing_weights(sizes, cap=100) == {"big": 0.5, "small": 0.5}
    assert mixing_weights(sizes, caps={"big": 300}) == {"big": 0.75, "small": 0.25}
    assert mixing_weights(sizes, cap=400, caps={"big": 300}) == {"big": 0.75, "small": 0.25}


def test_a_huge_alpha_does_not_overflow() -> None:
    assert mixing_weights({"big": 10**6, "small": 10}, alpha=10_000.0) == {"big": 1.0, "small": 0.0}


def test_explicit_weights() -> None:
    sizes = {"a": 1, "b": 1000, "c": 5}
    assert mixing_weights(sizes, weights={"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25, "c": 0.0}
    for bad in ({"a": -1, "b": 2}, {"c": 0.0}, {"a": 0.0, "b": 0.0}, {"nothing": 1.0}):
        with pytest.raises(InputError, match="must be positive for at least one task"):
            mixing_weights(sizes, weights=bad)


@given(sizes=SIZES, steps=st.integers(0, 10_000), alpha=st.floats(0, 2))
def test_allot_is_exact(sizes, steps, alpha) -> None:
    """Sums to the steps, each within one of its exact share."""
    weights = mixing_weights(sizes, alpha=alpha)
    counts = allot(weights, steps)
    assert sum(counts.values()) == steps
    for task, count in counts.items():
        assert abs(count - weights[task] * steps) < 1 + 1e-6
        assert count >= 0


# ---- the whole plan ----------------------------------------------------------------------------------------------


@given(steps=st.lists(st.integers(0, 8), min_size=1, max_size=4), size=st.integers(2, 5), seed=st.integers(0, 99))
def test_the_plan(steps, size, seed) -> None:
    """Exactly the steps asked for, one task a batch, the same plan again, whatever else is in the plan."""
    tables = {f"task{n}": distinct(20 + n) for n in range(len(steps))}
    for name, rows in tables.items():
        rows.name = name
    wanted = {f"task{n}": count for n, count in enumerate(steps)}
    plan = plan_batches(tables, wanted, size, seed)
    assert Counter(batch.task for batch in plan) == Counter({task: count for task, count in wanted.items() if count})
    assert plan == plan_batches(dict(reversed(tables.items())), dict(reversed(wanted.items())), size, seed)
    for task, count in wanted.items():
        mine = [batch.rows for batch in plan if batch.task == task]
        assert mine == list(itertools.islice(batch_stream(tables[task], size, seed), count))


def test_tasks_alternate() -> None:
    """Not all of one task and then all of the other: the last task would win."""
    tables = {"a": distinct(40), "b": distinct(40)}
    plan = plan_batches(tables, {"a": 50, "b": 50}, 4, 0)
    changes = sum(one.task != two.task for one, two in itertools.pairwise(plan))
    assert 30 < changes < 70


@pytest.mark.parametrize(
    ("rows", "size", "epochs", "cap", "expected"),
    [
        (640, 64, 1.0, None, 10),
        (640, 64, 0.5, None, 5),
        (640, 64, 3, 7, 7),
        (3, 64, 1.0, None, 1),
        (650, 64, 2, None, 20),
    ],
)
def test_steps_for(rows, size, epochs, cap, expected) -> None:
    assert steps_for(rows, size, epochs, cap) == expected
