"""Rows held out of training: which, how many, and that no table keeps them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.data.held_out import hold_out, without
from scalemerge.data.tasks import TaskRows, rows_of
from scalemerge.errors import InputError


def pairs(queries: list[int], name: str = "a") -> TaskRows:
    from datasets import Dataset

    rows = range(len(queries))
    texts = {"query": [f"q{query}" for query in queries], "positive": [f"p{row}" for row in rows]}
    return rows_of(name, "pairs", [Dataset.from_dict({"row": list(rows), **texts})])


def labelled(labels: list[int]) -> TaskRows:
    from datasets import Dataset

    columns = {"text": [f"t{row}" for row in range(len(labels))], "label": [str(label) for label in labels]}
    return rows_of("a", "labelled_texts", [Dataset.from_dict({"row": list(range(len(labels))), **columns})])


@given(st.lists(st.integers(0, 60), min_size=40, max_size=120), st.integers(2, 20), st.integers(0, 9))
def test_one_row_an_anchor_and_at_most_a_quarter_leaves(queries: list[int], count: int, seed: int) -> None:
    rows = pairs(queries)
    try:
        held = hold_out(rows, count, seed)
    except InputError as error:
        assert "too few to hold some out" in str(error)
        return
    anchors = held.anchors()
    assert 2 <= len(held) == len(anchors) <= count
    left = without(rows, anchors)
    assert isinstance(left, TaskRows)
    assert len(left) >= 0.75 * len(rows) and not left.anchors() & anchors
    assert {*left.ids} == {row for number, row in enumerate(rows.ids) if rows.anchor(number) not in anchors}


def test_the_choice_follows_from_texts_and_seed() -> None:
    few, many = pairs(list(range(200))), pairs(list(range(400)))
    assert hold_out(few, 20, 0).ids == hold_out(few, 20, 0).ids != hold_out(few, 20, 1).ids
    assert list(hold_out(few, 30, 0).ids)[:20] == list(hold_out(few, 20, 0).ids), "a larger number holds out more"
    reversed_ = pairs(list(range(200))[::-1])
    assert hold_out(few, 20, 0).data["query"] == hold_out(reversed_, 20, 0).data["query"]
    chosen = {*hold_out(many, 40, 0).data["query"]} & {f"q{n}" for n in range(200)}
    assert chosen <= {*hold_out(few, 40, 0).data["query"]}, "rows that are added keep others where they were"


def test_labelled_texts_come_in_pairs_of_one_label() -> None:
    rows = labelled([n // 3 for n in range(300)] + list(range(1000, 1050)))
    labels = list(hold_out(rows, 40, 0).data["label"])
    assert len(labels) == 40
    assert labels[::2] == labels[1::2]


def test_too_little_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"tasks\.a: 7 rows are too few to hold some out for evaluation; give more"):
        hold_out(pairs(list(range(7))), 20, 0)
    rows = pairs([1] * 10)
    with pytest.raises(InputError, match="lower evaluation_rows"):
        without(rows, rows.anchors())


def test_scores_that_are_all_equal_cannot_be_held_out() -> None:
    from datasets import Dataset

    columns = {"sentence1": [f"a{n}" for n in range(40)], "sentence2": [f"b{n}" for n in range(40)]}
    data = Dataset.from_dict({"row": list(range(40)), **columns, "score": [1.0] * 40})
    with pytest.raises(InputError, match="one score only"):
        hold_out(rows_of("a", "scored_pairs", [data]), 10, 0)
