"""Did merging win? One pure function answers, for the terminal and the page alike.

The candidate is the learned merge (Self Positioning). It is held against the *best* joint baseline, the *best* static
merge, the best single expert and the base model: the strongest rival of each group, chosen on the same scores, so the
comparison leans against us rather than for us. Only models that were scored on every task take part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from scalemerge.report import quantities
from scalemerge.report.results import ModelResult, Results

Outcome = Literal["wins", "ties", "loses", "mixed", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """The candidate against one rival. `difference` is in points; above zero the candidate is ahead."""

    against: str
    rival: ModelResult
    difference: float
    cost_ratio: float | None

    @property
    def standing(self) -> Literal["ahead", "level", "behind"]:
        """The sign of the difference as it prints: below 0.05 points it is level."""
        if abs(self.difference) < quantities.TIE_POINTS:
            return "level"
        return "ahead" if self.difference > 0 else "behind"


@dataclass(frozen=True)
class Verdict:
    """`outcome` weighs the rivals that matter (best joint baseline, best static merge); the rest is context."""

    outcome: Outcome
    headline: str
    line: str
    candidate: ModelResult | None = None
    joint: Comparison | None = None
    static: Comparison | None = None
    expert: Comparison | None = None
    base: Comparison | None = None
    own_seconds: float | None = None

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every comparison that the run allows, the most telling first."""
        return tuple(one for one in (self.joint, self.static, self.expert, self.base) if one is not None)


def verdict(results: Results) -> Verdict:
    """Weigh the learned merge (or, without one, the best static merge) against its rivals."""
    complete = [model for model in results.models if results.complete(model)]
    merges = [model for model in complete if model.kind == "merge"]
    learned = [model for model in merges if model.learned]
    candidate = next((model for model in learned if model.key == "merge:self_positioning"), None)
    candidate = candidate or best(learned) or best(merges)
    if candidate is None:
        why = "no merged model has been scored on every task yet"
        return Verdict("undecided", "No verdict yet", f"No verdict yet: {why}.")

    def against(kind: str, named: str, models: Iterable[ModelResult]) -> Comparison | None:
        rivals = [model for model in models if model.kind == kind and model is not candidate]
        return compare(candidate, best(rivals), named)

    joint = against("joint", "best joint baseline", complete)
    static = against("merge", "best static merge", [model for model in complete if not model.learned])
    expert = against("expert", "best single expert", complete)
    base = against("base", "base model", complete)
    # A static merge that stands in as candidate is not judged against the merges that it was picked from.
    outcome = _outcome(joint, static if candidate.learned else None)
    return Verdict(
        outcome,
        _headline(candidate, joint, static),
        _line(candidate, joint, static),
        candidate,
        joint,
        static,
        expert,
        base,
        own_seconds(results, candidate),
    )


def best(models: Iterable[ModelResult]) -> ModelResult | None:
    """The model with the highest mean; the first of equals."""
    scored = [(model.mean, model) for model in models if model.mean is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def compare(candidate: ModelResult, rival: ModelResult | None, named: str) -> Comparison | None:
    """Difference in points and ratio of seconds, or None where there is nothing to compare with."""
    if rival is None or rival.mean is None or candidate.mean is None:
        return None
    mine, theirs = candidate.cost.seconds, rival.cost.seconds
    cost_ratio = mine / theirs if mine is not None and theirs else None
    return Comparison(named, rival, candidate.mean - rival.mean, cost_ratio)


def own_seconds(results: Results, model: ModelResult) -> float | None:
    """Seconds of `model` without the models its cost includes; None where that cannot be known."""
    included = [results.find(key) for key in model.cost.includes]
    parts = [one.cost.seconds for one in included if one is not None and one.cost.seconds is not None]
    if model.cost.seconds is None or not included or len(parts) < len(included):
        return None
    rest = model.cost.seconds - sum(parts)
    return rest if rest >= 0 else None


def _outcome(joint: Comparison | None, static: Comparison | None) -> Outcome:
    if joint is None:  # "merging instead of joint training" is the question; without the latter there is no answer
        return "undecided"
    standings = {one.standing for one in (joint, static) if one is not None}
    if {"ahead", "behind"} <= standings:
        return "mixed"
    if "ahead" in standings:
        return "wins"
    return "loses" if "behind" in standings else "ties"


def _headline(candidate: ModelResult, joint: Comparison | None, static: Comparison | None) -> str:
    verbs = {"ahead": "beats", "level": "is level with", "behind": "loses to"}
    versus_static = f"{verbs[static.standing]} the best static merge" if static and candidate.learned else ""
    if joint is None:
        claim = f"{candidate.label} {versus_static}; " if versus_static else f"{candidate.label}: "
        return f"{claim}no joint baseline to compare with"
    versus_joint = f"{candidate.label} {verbs[joint.standing]} joint training"
    if static is None or not versus_static:
        return versus_joint
    if static.standing == joint.standing:
        return f"{versus_joint} and the best static merge"
    link = "but" if "behind" in (static.standing, joint.standing) else "and"
    return f"{versus_joint} {link} {versus_static}"


def _line(candidate: ModelResult, joint: Comparison | None, static: Comparison | None) -> str:
    parts = [_phrase(joint) if joint else "no joint baseline to compare with"]
    if candidate.learned:
        parts.append(_phrase(static) if static else "no static merge to compare with")
    note = "" if candidate.learned else " (static merge; no Self Positioning result)"
    return f"{candidate.label} {quantities.points(candidate.mean)}{note}: {', '.join(parts)}"


def _phrase(one: Comparison) -> str:
    amount = {
        "ahead": f"{quantities.signed(one.difference)} over",
        "level": "level with",
        "behind": f"{abs(one.difference):.1f} behind",
    }[one.standing]
    return f"{amount} the {one.against} ({one.rival.label}, {quantities.points(one.rival.mean)})"
