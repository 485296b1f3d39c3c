"""Which rows go into which batch: properties of the plan."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalemerge.data.sampling import allot, batch_stream, mixing_weights, steps_for
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


def one_after_another(rows: TaskRows, size: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """The definition, word for word: shuffle, put each row into the first batch that has none of its texts."""
    generator = random.Random(f"{seed}/{rows.name}")
    made: list[tuple[int, ...]] = []
    waiting: list[int] = []
    while len(made) < count:
        order = list(range(len(rows)))
        generator.shuffle(order)
        waiting += order
        while True:
            batch: list[int] = []
            left: list[int] = []
            seen: set[int] = set()
            for row in waiting:
                if len(batch) < size and (rows.kind == "scored_pairs" or not seen & set(rows.texts[row])):
                    batch.append(row)
                    seen |= set(rows.texts[row])
                else:
                    left.append(row)
            if len(batch) < size:
                waiting = batch + left
                break
            made.append(tuple(batch))
            waiting = left
    return made[:count]


@given(
    texts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(0, 99)), min_size=12, max_size=80),
    size=st.integers(2, 6),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["triplets", "scored_pairs"]),
)
@settings(max_examples=200)
def test_rows_wait_their_turn(texts, size, seed, kind) -> None:
    """However many wait for a batch without their texts, and over several passes: the batches of the definition."""
    rows = table([tuple(f"t{number}" for number in row) for row in texts], kind)
    try:
        made = batches(rows, size, 30, seed)
    except InputError:
        return
    assert made == one_after_another(rows, size, 30, seed)


def test_a_text_in_every_other_row_takes_no_time_to_pass_over() -> None:
    """100,000 rows of one text, of which each batch takes one: looking through all of them each time takes an hour."""
    count = 200_000
    rows = TaskRows("t", "pairs", None, range(count), [(n if n % 2 else 1, count + n) for n in range(count)])
    began = time.monotonic()
    made = batches(rows, 64, 1500)
    assert all(sum(row % 2 == 0 for row in batch) <= 2 for batch in made)
    assert time.monotonic() - began < 20


# ---- batches of like lengths -------------------------------------------------------------------------------------


def of_lengths(lengths: list[int], kind: str = "pairs", labels: list[str] | None = None) -> TaskRows:
    """Rows whose longest text has so many characters; the other one has two."""
    from datasets import Dataset

    texts = [f"{row}".ljust(length, "x") for row, length in enumerate(lengths)]
    columns = {"text": texts, "label": labels} if labels else {"query": ["qq"] * len(texts), "positive": texts}
    prints = [(row,) if labels else (row, len(texts) + row) for row in range(len(texts))]
    return TaskRows("t", kind, Dataset.from_dict(columns), [f"s0:{n}" for n in range(len(texts))], prints)


def bucketed(rows: TaskRows, size: int, count: int, buckets: int, seed: int = 0) -> list[tuple[int, ...]]:
    return list(itertools.islice(batch_stream(rows, size, seed, 4, buckets), count))


def padding(rows: TaskRows, made: list[tuple[int, ...]]) -> float:
    """The share of characters that are padding."""
    lengths = rows.lengths()
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in made)
    return 1 - sum(lengths[row] for batch in made for row in batch) / padded


def test_lengths_are_those_of_the_longest_text() -> None:
    from datasets import Dataset

    columns = {"query": ["aaaa", "a", "a"], "positive": ["b", "bbb", "b"], "negatives": [[], ["c"], ["c", "ccccc"]]}
    rows = TaskRows("t", "triplets", Dataset.from_dict(columns), list("abc"), [()] * 3)
    assert list(rows.lengths()) == [4, 3, 5]
    assert list(of_lengths([5, 9], "labelled_texts", ["x", "y"]).lengths()) == [5, 9]


def test_buckets_save_padding() -> None:
    generator = random.Random(0)
    rows = of_lengths([generator.randint(8, 400) for _ in range(640)])
    shares = [padding(rows, bucketed(rows, 16, 40, buckets)) for buckets in (1, 2, 8)]
    assert shares[0] > 0.4 and shares[0] > shares[1] + 0.1 and shares[1] > shares[2] + 0.1 and shares[2] < 0.2


def test_buckets_come_in_no_order_of_length() -> None:
    generator = random.Random(0)
    rows = of_lengths([generator.randint(8, 400) for _ in range(640)])
    lengths, made = rows.lengths(), bucketed(rows, 16, 40, 40)
    longest = [max(lengths[row] for row in batch) for batch in made]
    rises = sum(a < b for a, b in itertools.pairwise(longest))
    assert 10 < rises < 29


@given(
    texts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=8, max_size=60),
    size=st.integers(2, 5),
    buckets=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_no_text_twice_in_a_batch_of_like_lengths(texts, size, buckets, seed) -> None:
    rows = of_lengths([2 + 7 * a for a, _ in texts])
    rows.texts = [(a, 100 + b) for a, b in texts]
    try:
        made = bucketed(rows, size, 12, buckets, seed)
    except InputError as error:
        assert "cannot fill a batch" in str(error)
        return
    assert made == bucketed(rows, size, 12, buckets, seed)
    for batch in made:
        seen = [text for row in batch for text in rows.texts[row]]
        assert len(batch) == size and len(seen) == len(set(seen))


@given(count=st.integers(10, 60), size=st.integers(2, 6), buckets=st.integers(2, 5), seed=st.integers(0, 99))
def test_buckets_use_every_row_as_often(count, size, buckets, seed) -> None:
    """The longest too: over 6 passes each row is used 5 to 7 times."""
    rows = of_lengths([2 + row for row in range(count)])
    used = Counter(row for batch in bucketed(rows, size, 6 * count // size, buckets, seed) for row in batch)
    assert set(used) == set(range(count)) and set(used.values()) <= {5, 6, 7}


@given(size=st.integers(3, 12), buckets=st.integers(2, 5), seed=st.integers(0, 9999))
@settings(max_examples=200)
def test_buckets_keep_texts_of_a_label_together(size, buckets, seed) -> None:
    generator = random.Random(seed)
    labels = [str(row % 12) for row in range(96)]
    rows = of_lengths([generator.randint(3, 90) for _ in range(96)], "labelled_texts", labels)
    for batch in bucketed(rows, size, 96 // size, buckets, seed):
        assert max(Counter(labels[row] for row in batch).values()) >= 2


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
