"""The line of a step in training.jsonl, and the trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from scalemerge.data.probe import load_tasks
from scalemerge.errors import InputError
from scalemerge.recipe import Recipe
from scalemerge.training import expert_job
from scalemerge.training import loop as training_loop
from scalemerge.training import metrics as metrics_module


def lines(folder: Path, name: str = "training.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(("chunk_tokens", "passes"), [(None, 3), (10**6, 3), (80, 3.75)])
def test_the_fields_of_a_line(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk_tokens: int | None,
    passes: float,
) -> None:
    """passes: forward passes' worth of FLOPs; chunks of four of 16 texts, the last one's graph is kept: 3 + 3/4."""
    peak = 1e9
    monkeypatch.setattr(metrics_module, "peak_flops", lambda device, precision: peak)
    recipe = make_recipe(
        ["names"], evaluate_every=None, batch_size=16, max_steps=3, length_groups=1, chunk_tokens=chunk_tokens
    )
    length = 20
    rows = [{"text": f"{n:018d}", "label": f"l{n // 4}"} for n in range(100)]  # 18 bytes, <s> and </s>
    Path(recipe.tasks["names"].sources[0].path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cost = training_loop.train(expert_job(recipe, load_tasks(recipe), "names"), tmp_path / "out")

    weights = 2 * (4 * 32 * 32 + 2 * 32 * 48)  # two layers: query, key, value, output; up and down
    attention = 2 * 2 * length * 32 * 2  # a token: scores and sums over so many tokens, two layers
    forward = 16 * length * (2 * weights + attention)
    found = lines(tmp_path / "out")
    assert [line["step"] for line in found] == [0, 1, 2]
    for number, line in enumerate(found, start=1):
        assert {"task", "loss", "learning_rate", "gradient_norm"} <= line.keys()
        assert line["tokens"] == number * 16 * length
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(16 * length, rel=0.02)
        assert line["mfu"] * peak * line["step_seconds"] == pytest.approx(3 * forward, rel=0.05)
        assert 0 <= line["waited_seconds"] <= line["step_seconds"]
        assert 10**7 < line["peak_bytes"] <= cost.peak_bytes
        assert line["seconds"] == pytest.approx(sum(each["step_seconds"] for each in found[:number]), abs=0.002)
    assert cost.flops == 3 * passes * forward


def test_no_mfu_where_the_peak_is_not_known(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(["names"], evaluate_every=None, max_steps=1)
    training_loop.train(expert_job(recipe, load_tasks(recipe), "names"), tmp_path / "out")
    assert all("mfu" not in line for line in lines(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbored", "'tensorbored' is not one of .*tensorboard"), ("comet_ml", "'comet_ml' is not installed; pip")],
)
def test_a_tracker_that_cannot_be_had_is_refused_before_the_model_is_loaded(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    monkeypatch.setattr(training_loop, "load_encoder", lambda *_, **__: pytest.fail("the model was loaded"))
    recipe = make_recipe(["names"], trackers=[name])
    with pytest.raises(InputError, match=rf"^training\.trackers: {message}") as caught:
        training_loop.train(expert_job(recipe, load_tasks(recipe), "names"), tmp_path / "out")
    assert "\n" not in str(caught.value)


class Recorder(tracking.GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory = "tensorboard", False
    started: list[str] = []
    config: dict[str, Any] = {}
    logged: list[tuple[int, dict[str, Any]]] = []
    ended = 0

    def __init__(self, run_name: str, **_: Any) -> None:
        super().__init__()
        Recorder.started.append(run_name)

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        Recorder.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        Recorder.logged.append((step, values))

    def finish(self) -> None:
        Recorder.ended += 1


def test_trackers_get_steps_and_evaluations(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils import LoggerType

    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    recipe = make_recipe(["search"], trackers=["tensorboard"], max_steps=4)
    training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / "out")
    assert Recorder.started == ["search"] and Recorder.ended == 1
    assert Recorder.config["batch_size"] == 8
    steps = [(step, values) for step, values in Recorder.logged if "loss" in values]
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    for (_, values), line in zip(steps, lines(tmp_path / "out"), strict=True):
        assert values == {name: value for name, value in line.items() if name != "task"}
    evaluations = [(step, values) for step, values in Recorder.logged if "loss" not in values]
    assert [step for step, _ in evaluations] == [2, 4]
    for (_, values), line in zip(evaluations, lines(tmp_path / "out", "evaluation.jsonl"), strict=True):
        figures = line["tasks"]["search"]
        assert values == {
            "evaluation/score": line["score"],
            "evaluation/search/loss": figures["loss"],
            "evaluation/search/mrr_at_10": figures["mrr_at_10"],
        }
    assert [step for step, _ in Recorder.logged] == sorted(step for step, _ in Recorder.logged), "W&B wants them so"
