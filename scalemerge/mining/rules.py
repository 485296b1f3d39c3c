"""Which of a query's nearest texts become its negatives: a window of ranks, margins below the positive, a sample.

The nearest texts are often unlabelled positives ("false negatives"). Two rules keep them out: the first `rank_min`
texts are passed over, and a text must score below the query's own positive s(q, p) by a margin,

    s(q, d) < s(q, p) - margin_absolute             TopK-MarginPos
    s(q, d) < margin_relative * s(q, p)             TopK-PercPos

Source: NV-Retriever (Moreira et al. 2024, arXiv 2407.15831), which finds TopK-PercPos with 0.95 best. Where s(q, p) is
negative the second rule reads s(q, p) - (1 - margin_relative) |s(q, p)|, which is the same above zero and stays below
the positive.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalemerge.errors import InputError

SAMPLINGS = ("top", "random")


@dataclass(frozen=True)
class Rules:
    """How negatives are chosen.

    Ranks count the texts of the corpus that are neither the query nor one of its known positives, best first: the
    first `rank_min` are passed over and none after the first `rank_max` is taken, whatever the margins refuse.
    sampling: `top` takes the best that pass, `random` a sample of them that depends on `seed` and the row alone. Rows
    with fewer than `min_negatives` are dropped. Margins of None are not applied.
    """

    negatives: int = 7
    rank_min: int = 10
    rank_max: int = 100
    margin_absolute: float | None = None
    margin_relative: float | None = 0.95
    sampling: str = "top"
    seed: int = 0
    min_negatives: int = 0

    def check(self) -> None:
        """Raises InputError naming the option of the command line."""
        if self.negatives < 1:
            raise InputError(f"--negatives {self.negatives}: give at least 1")
        if not 0 <= self.rank_min < self.rank_max:
            raise InputError(
                f"--rank-min {self.rank_min}: must be at least 0 and below --rank-max {self.rank_max}; ranks between "
                "them are taken"
            )
        if self.rank_max - self.rank_min < self.negatives:
            raise InputError(
                f"--negatives {self.negatives}: only {self.rank_max - self.rank_min} ranks lie between --rank-min and "
                "--rank-max; raise --rank-max"
            )
        if self.margin_absolute is not None and not 0 <= self.margin_absolute < math.inf:
            raise InputError(f"--margin-absolute {self.margin_absolute}: give a number from 0 up")
        if self.margin_relative is not None and not 0 < self.margin_relative <= 1:
            raise InputError(f"--margin-relative {self.margin_relative}: give a number above 0 and at most 1")
        if self.sampling not in SAMPLINGS:
            raise InputError(f"--sampling {self.sampling}: choose {' or '.join(SAMPLINGS)}")
        if not 0 <= self.min_negatives <= self.negatives:
            raise InputError(f"--min-negatives {self.min_negatives}: give 0 to --negatives {self.negatives}")


def thresholds(positive: Tensor, rules: Rules) -> dict[str, Tensor]:
    """By margin rule, the score a negative must stay below. positive [R] float: s(q, p). Returns [R] each."""
    found = {}
    if rules.margin_absolute is not None:
        found["margin_absolute"] = positive - rules.margin_absolute
    if rules.margin_relative is not None:
        found["margin_relative"] = positive - (1 - rules.margin_relative) * positive.abs()
    return found


def choose(scores: Tensor, positive: Tensor, rules: Rules, numbers: Sequence[int]) -> tuple[list[list[int]], Counter]:
    """The ranks that each row's negatives have, ascending.

    scores [R, K] float32, best first, -inf where there is no text; positive [R] float32; numbers: the rows' numbers,
    which `random` is seeded by. Counted: "candidates" looked at, those before "rank_min", and those that each margin
    alone refuses (both may refuse the same one).
    """
    there = scores > -torch.inf
    window = there[:, rules.rank_min :]
    counts = Counter(candidates=int(there.sum()), rank_min=int(there[:, : rules.rank_min].sum()))
    passes = window.clone()
    for name, threshold in thresholds(positive, rules).items():
        below = scores[:, rules.rank_min :] < threshold[:, None]
        counts[name] = int((window & ~below).sum())
        passes &= below
    chosen = []
    for number, row in zip(numbers, passes, strict=True):
        ranks = (row.nonzero()[:, 0] + rules.rank_min).tolist()
        if rules.sampling == "random" and len(ranks) > rules.negatives:
            ranks = sorted(random.Random(f"{rules.seed} {number}").sample(ranks, rules.negatives))
        chosen.append(ranks[: rules.negatives])
    return chosen, counts
