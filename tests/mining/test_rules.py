"""Each rule removes what it should and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.mining import Rules
from scalemerge.mining.rules import choose

PLAIN = Rules(negatives=3, rank_min=0, rank_max=8, margin_absolute=None, margin_relative=None)
SCORES = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]])


def ranks(rules: Rules, positive: float = 0.75, scores: torch.Tensor = SCORES) -> list[int]:
    return choose(scores, torch.tensor([positive]), rules, [0])[0][0]


def test_top_takes_the_best() -> None:
    assert ranks(PLAIN) == [0, 1, 2]


def test_rank_min_passes_over_the_best() -> None:
    assert ranks(replace(PLAIN, rank_min=2)) == [2, 3, 4]


def test_relative_margin() -> None:
    """0.95 x 0.75 = 0.7125: 0.9 and 0.8 go, 0.7 stays."""
    chosen, counts = choose(SCORES, torch.tensor([0.75]), replace(PLAIN, margin_relative=0.95), [0])
    assert chosen == [[2, 3, 4]]
    assert counts["margin_relative"] == 2
    assert ranks(replace(PLAIN, margin_relative=0.9)) == [3, 4, 5]  # 0.675


def test_relative_margin_is_strict() -> None:
    scores = torch.tensor([[0.5, 0.25]])
    assert ranks(replace(PLAIN, margin_relative=1.0), 0.5, scores) == [1]


def test_relative_margin_of_a_negative_positive_stays_below_it() -> None:
    """s(q, p) = -0.2 and 0.5: the bound is -0.3, not the product -0.1."""
    scores = torch.tensor([[-0.05, -0.15, -0.25, -0.35]])
    assert ranks(replace(PLAIN, margin_relative=0.5), -0.2, scores) == [3]


def test_absolute_margin() -> None:
    chosen, counts = choose(SCORES, torch.tensor([0.75]), replace(PLAIN, margin_absolute=0.2), [0])
    assert chosen == [[4, 5, 6]]
    assert (counts["margin_absolute"], counts["candidates"]) == (4, 8)
    assert "margin_relative" not in counts


def test_margins_together_and_their_counts() -> None:
    rules = replace(PLAIN, margin_absolute=0.1, margin_relative=0.6, rank_min=1)
    chosen, counts = choose(SCORES, torch.tensor([0.75]), rules, [0])  # below 0.65 and below 0.45
    assert chosen == [[5, 6, 7]]
    assert counts == {"candidates": 8, "rank_min": 1, "margin_absolute": 2, "margin_relative": 4}


def test_places_without_a_text_are_never_chosen_or_counted() -> None:
    scores = torch.tensor([[0.5, 0.4, -torch.inf, -torch.inf]])
    chosen, counts = choose(scores, torch.tensor([0.45]), replace(PLAIN, margin_relative=1.0), [0])
    assert chosen == [[1]]
    assert counts == {"candidates": 2, "rank_min": 0, "margin_relative": 1}


def test_random_samples_what_passes_by_seed_and_row() -> None:
    rules = replace(PLAIN, sampling="random", rank_min=1, margin_relative=0.95)
    rows = torch.cat([SCORES] * 40)
    positive = torch.full((40,), 0.75)
    chosen, _ = choose(rows, positive, rules, range(40))
    assert all(len(set(row)) == 3 and row == sorted(row) and min(row) >= 2 for row in chosen)
    assert {rank for row in chosen for rank in row} == {2, 3, 4, 5, 6, 7}
    assert choose(rows[:7], positive[:7], rules, range(7))[0] == chosen[:7]
    assert choose(rows, positive, replace(rules, seed=1), range(40))[0] != chosen


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"rank_min": 8}, "--rank-min 8"),
        ({"rank_min": -1}, "--rank-min -1"),
        ({"negatives": 0}, "--negatives 0"),
        ({"negatives": 9}, "--negatives 9"),
        ({"margin_relative": 0.0}, "--margin-relative"),
        ({"margin_relative": 1.5}, "--margin-relative"),
        ({"margin_relative": float("nan")}, "--margin-relative"),
        ({"margin_absolute": -0.1}, "--margin-absolute"),
        ({"margin_absolute": float("nan")}, "--margin-absolute"),
        ({"sampling": "best"}, "--sampling best"),
        ({"min_negatives": 4}, "--min-negatives 4"),
    ],
)
def test_bad_rules(changes: dict[str, object], option: str) -> None:
    PLAIN.check()
    with pytest.raises(InputError) as error:
        replace(PLAIN, **changes).check()  # type: ignore[arg-type]
    assert option in str(error.value)
