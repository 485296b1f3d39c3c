"""The recipes that come with the project find their data."""

from __future__ import annotations

from pathlib import Path

import pytest

from scalemerge.pipeline import prepare
from scalemerge.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_the_shared_suite_prepares(shared_data: Path, minilm: Path, tmp_path: Path) -> None:
    run = prepare(load_recipe(RECIPES / "shared-suite.yaml", data=shared_data), tmp_path)
    assert set(run.data) == {"retrieval", "sts", "nli", "paraphrase", "classification"}
    for name, task in run.data.items():
        seen = task.train.anchors()
        assert len(task.probe) == 512 or name == "sts"
        assert not seen & (task.probe.anchors() | task.validation.anchors())
    sources = {run.data["retrieval"].probe.source_of(row) for row in range(512)}
    assert sources == {"s0", "s1"}, "probe rows come from both data sets of the task"


@pytest.mark.slow
def test_the_docs_recipe_prepares(minilm: Path, tmp_path: Path) -> None:
    run = prepare(load_recipe(RECIPES / "docs.yaml"), tmp_path)
    assert all(len(task.train) > 1000 for task in run.data.values())
