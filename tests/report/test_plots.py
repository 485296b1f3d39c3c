"""Figures render to deterministic, valid SVG, from full runs and from scraps."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scalemerge.report import curves, plots
from scalemerge.report.labels import spread
from scalemerge.report.reading import Position, SearchStep, TrainingStep, read_run
from scalemerge.report.results import parse_results
from tests.report.conftest import write_run


def words(svg: str) -> set[str]:
    """All text in the figure; parsing proves that it is well-formed."""
    return {
        "".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter() if "text" in element.tag
    }


def test_every_figure_of_a_run_names_its_axes_and_series(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.position is not None
    wanted = {
        plots.scores_by_type(run.results): {"Mean", "Retrieval", "Self Positioning", "points"},
        plots.cost_against_quality(run.results): {"mean score, points", "Joint: uniform", "TIES", "Self Positioning"},
        plots.gram_cosines(run.position): {"0.69", "‖T‖ 1.400", "clustering"},
        curves.coefficient_paths(run.history, run.position): {"search step", "merging coefficient c"},
        curves.loss_curves(run.history): {"validation", "probe set", "loss / loss at the start", "retrieval"},
        curves.training_curves(run.training): {"Expert: sts", "Joint: uniform", "training loss", "training step"},
    }
    assert len(wanted) == 6
    for svg, labels in wanted.items():
        assert svg is not None
        assert labels <= words(svg)


def test_figures_are_deterministic_and_carry_no_date(run_folder: Path) -> None:
    results = read_run(run_folder).results
    first = plots.scores_by_type(results)
    assert first == plots.scores_by_type(results)
    assert first is not None
    assert "metadata" not in first
    assert "<image" not in first


def test_groups_have_a_figure_of_their_own_only_where_there_are_groups(tmp_path: Path) -> None:
    layered = read_run(write_run(tmp_path / "layered", groups=6, steps=30)).position
    whole = read_run(write_run(tmp_path / "whole", steps=30)).position
    assert layered is not None
    assert whole is not None
    assert "layers.5" in words(curves.coefficients_by_group(layered) or "")
    assert curves.coefficients_by_group(whole) is None
    assert plots.whole_gram(layered) == [pytest.approx(row) for row in plots.whole_gram(whole) or []]


def test_scraps_draw_nothing_or_something_but_never_fail(results_json: dict[str, Any]) -> None:
    empty = parse_results({"schema": 1})
    assert plots.scores_by_type(empty) is None
    assert plots.cost_against_quality(empty) is None
    assert curves.coefficient_paths([]) is None
    assert curves.loss_curves([]) is None
    assert curves.training_curves({"expert:a": ()}) is None
    only = SearchStep(1, None, {"a": 0.0, "b": 2.0}, None, None, {"global": (0.5, -0.1)}, None)
    assert {"expert 1: 0.500", "expert 2: −0.100"} <= words(curves.coefficient_paths([only]) or "")
    assert curves.loss_curves([only]) is not None
    assert curves.training_curves({"expert:$a_b$": [TrainingStep(1, 2.0, None, None)]}) is not None
    for model in results_json["models"].values():
        model["cost"]["seconds"] = 0
    assert plots.cost_against_quality(parse_results(results_json)) is None
    assert plots.cost_against_quality(parse_results(results_json), "flops") is not None


def test_zero_and_nan_vectors_have_no_cosine() -> None:
    nan = float("nan")
    gram = ((4.0, 0.0, -2.0), (0.0, 0.0, nan), (-2.0, nan, 1.0))
    position = Position("linear", "global", ("a", "b", "c"), {}, {"global": gram})
    table = plots.cosines([list(row) for row in gram])
    assert table[0][2] == pytest.approx(-1.0)
    assert table[0][1] is None
    assert table[1][2] is None
    assert "−1.00" in words(plots.gram_cosines(position) or "")
    assert plots.gram_cosines(replace(position, gram={})) is None


def test_labels_are_moved_apart_in_order() -> None:
    placed = spread([1.0, 1.0, 1.1, 5.0], 0.5)
    assert placed[0] <= placed[1] <= placed[2] <= placed[3]
    assert min(later - earlier for earlier, later in pairwise(placed)) >= 0.5 - 1e-6
    assert placed[3] == 5.0
