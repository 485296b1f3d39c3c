"""Rows to tokenized texts by role: prompts on the right side, negatives with their rows, targets unrounded."""

from __future__ import annotations

import pytest
import torch

from scalemerge.data.collate import collate
from scalemerge.data.tasks import TaskRows
from scalemerge.recipe import Task

PROMPTS = {"query": "Q ", "document": "D "}


def rows(kind: str, **columns: list) -> TaskRows:
    from datasets import Dataset

    count = len(next(iter(columns.values())))
    return TaskRows("t", kind, Dataset.from_dict(columns), [f"s0:{n}" for n in range(count)], [()] * count)


def task(kind: str, **settings) -> Task:
    return Task(kind=kind, sources=[{"path": "x"}], prompts=PROMPTS, **settings)


def letters(texts, prompt):
    """A tokenizer that can be read back."""
    return [{"input_ids": [ord(letter) for letter in prompt + text]} for text in texts]


def read(features) -> list[str]:
    return ["".join(chr(number) for number in feature["input_ids"]) for feature in features]


@pytest.mark.parametrize("kind", ["pairs", "retrieval"])
def test_pairs(kind: str) -> None:
    batch = collate(rows(kind, query=["a", "b", "c"], positive=["x", "y", "z"]), [2, 0], task(kind), letters)
    assert {role: read(texts) for role, texts in batch.roles.items()} == {
        "query": ["Q c", "Q a"], "positive": ["D z", "D x"]}  # fmt: skip
    assert (batch.task, batch.loss, batch.targets, batch.negative_counts) == ("t", "infonce", {}, None)


def test_triplets_of_any_number() -> None:
    made = rows("triplets", query=["a", "b", "c"], positive=["x", "y", "z"], negatives=[["1"], [], ["2", "3"]])
    batch = collate(made, [2, 1, 0], task("triplets"), letters)
    assert read(batch.roles["negatives"]) == ["D 2", "D 3", "D 1"]
    assert batch.negative_counts == (2, 0, 1)
    assert [len(batch.share(rank, 3).roles["negatives"]) for rank in range(3)] == [2, 0, 1]


def test_scored_pairs() -> None:
    """Both sides are alike, so both take the query prompt."""
    made = rows("scored_pairs", sentence1=["a", "b"], sentence2=["x", "y"], score=[0.1, 4.75])
    batch = collate(made, [1, 0], task("scored_pairs", loss={"name": "cosent", "parameters": {"scale": 10}}), letters)
    assert read(batch.roles["sentence1"]) == ["Q b", "Q a"] and read(batch.roles["sentence2"]) == ["Q y", "Q x"]
    torch.testing.assert_close(batch.targets["score"], torch.tensor([4.75, 0.1]))
    assert (batch.loss, batch.parameters) == ("cosent", {"scale": 10})


def test_labelled_texts() -> None:
    """Labels become numbers that are equal exactly when the labels are, in any batch."""
    made = rows("labelled_texts", text=list("abcd"), label=["red", "blue", "red", "green"])
    first = collate(made, [0, 1, 2, 3], task("labelled_texts"), letters).targets["label"]
    again = collate(made, [2], task("labelled_texts"), letters).targets["label"]
    assert first.dtype == torch.int64 and (first >= 0).all()
    assert first[0] == first[2] == again[0] and len(set(first.tolist())) == 3


def test_labels_that_differ_in_case_alone_are_two() -> None:
    made = rows("labelled_texts", text=list("ab"), label=["May", "may"])
    labels = collate(made, [0, 1], task("labelled_texts"), letters).targets["label"]
    assert labels[0] != labels[1]


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_tokenizes_its_share_alone(world: int) -> None:
    """The same share as that of the whole batch, negatives and targets included, without the others' texts."""
    made = rows("triplets", query=["a", "b", "c"], positive=["x", "y", "z"], negatives=[["1"], [], ["2", "3"]])
    whole = collate(made, [2, 1, 0], task("triplets"), letters)
    for rank in range(world):
        share = collate(made, [2, 1, 0], task("triplets"), letters, rank=rank, world=world)
        assert share == whole.share(rank, world)


def test_matryoshka_dimensions_reach_the_batch() -> None:
    made = rows("pairs", query=["a", "b"], positive=["x", "y"])
    asked = task("pairs", loss={"name": "infonce", "matryoshka": [8, 4], "matryoshka_weights": [1.0, 0.5]})
    assert collate(made, [0, 1], asked, letters).matryoshka == ((8, 1.0), (4, 0.5))
    equal = task("pairs", loss={"name": "infonce", "matryoshka": [8, 4]})
    assert collate(made, [0, 1], equal, letters).matryoshka == ((8, 1.0), (4, 1.0))
