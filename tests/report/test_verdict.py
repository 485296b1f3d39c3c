"""The verdict says who won, and says so too when it is not us."""

from __future__ import annotations

from typing import Any

import pytest

from scalemerge.report.results import Results, parse_results
from scalemerge.report.verdict import verdict


def results_of(**means: float) -> Results:
    """Models with one task each; `joint__a=70` is the key joint:a."""
    models = {
        key.replace("__", ":"): {"scores": {"task": mean}, "by_type": {"STS": mean}, "mean": mean, "cost": {}}
        for key, mean in means.items()
    }
    suite = {"name": "s", "tasks": [{"name": "task", "type": "STS", "metric": "spearman"}]}
    return parse_results({"schema": 1, "suite": suite, "models": models, "environment": {}})


def test_win_names_the_best_of_each_group_and_the_distance(results_json: dict[str, Any]) -> None:
    answer = verdict(parse_results(results_json))
    assert answer.outcome == "wins"
    assert answer.line == (
        "Self Positioning 72.2: +0.9 over the best joint baseline (proportional, 71.3), "
        "+0.7 over the best static merge (Task arithmetic, 71.5)"
    )
    assert answer.joint is not None
    assert answer.joint.cost_ratio == pytest.approx(781 / 718)
    assert answer.own_seconds == pytest.approx(781 - 412 - 128 - 96 - 84)


def test_loss_is_said_plainly() -> None:
    answer = verdict(results_of(base=60, joint__a=71.0, joint__b=69, merge__average=70.5, merge__self_positioning=70.0))
    assert answer.outcome == "loses"
    assert answer.headline == "Self Positioning loses to joint training and the best static merge"
    assert "1.0 behind the best joint baseline (a, 71.0)" in answer.line
    assert "0.5 behind the best static merge" in answer.line


@pytest.mark.parametrize(("learned", "outcome"), [(70.04, "ties"), (69.96, "ties"), (70.06, "wins"), (69.94, "loses")])
def test_a_difference_that_prints_as_zero_is_a_tie(learned: float, outcome: str) -> None:
    answer = verdict(results_of(joint__a=70.0, merge__average=70.0, merge__self_positioning=learned))
    assert answer.outcome == outcome


def test_between_joint_and_static_is_mixed() -> None:
    answer = verdict(results_of(joint__a=70.0, merge__average=72.0, merge__self_positioning=71.0))
    assert answer.outcome == "mixed"
    assert answer.headline == "Self Positioning beats joint training but loses to the best static merge"


def test_without_a_joint_baseline_nothing_is_won() -> None:
    answer = verdict(results_of(base=60, merge__average=70.0, merge__self_positioning=71.0))
    assert answer.outcome == "undecided"
    assert "no joint baseline" in answer.headline
    assert "no joint baseline" in answer.line


def test_without_a_learned_merge_the_best_static_one_stands_in() -> None:
    answer = verdict(results_of(joint__a=70.0, merge__average=69.0, merge__ties=71.0))
    assert answer.candidate is not None
    assert answer.candidate.key == "merge:ties"
    assert answer.outcome == "wins"
    assert "no Self Positioning result" in answer.line
    assert "static merge (Average" not in answer.line


@pytest.mark.parametrize("means", [{}, {"base": 60.0}, {"base": 60.0, "joint__a": 70.0}])
def test_no_merge_no_verdict(means: dict[str, float]) -> None:
    assert verdict(results_of(**means)).outcome == "undecided"


def test_a_partly_scored_rival_takes_no_part(results_json: dict[str, Any]) -> None:
    rival = results_json["models"]["joint:uniform"]
    rival["mean"] = 99.0
    del rival["scores"]["topic_clusters"]
    answer = verdict(parse_results(results_json))
    assert answer.joint is not None
    assert answer.joint.rival.key == "joint:proportional"


def test_the_named_merge_is_judged_and_not_its_luckiest_variant() -> None:
    answer = verdict(results_of(joint__a=70.0, merge__self_positioning=71.0, merge__self_positioning_linear=73.0))
    assert answer.candidate is not None
    assert answer.candidate.key == "merge:self_positioning"
