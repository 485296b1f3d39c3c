"""A run from recipe to report, killed at random moments and resumed: the same coefficients, weights and scores."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scalemerge.recipe import load_recipe

pytest.importorskip("mteb", reason="the extra 'eval' is not installed")


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "results.json").read_text())


def products(folder: Path) -> dict[str, bytes]:
    """The files that must be equal bit for bit."""
    found = {"coefficients": (folder / "position/coefficients.json").read_bytes()}
    for path in sorted(folder.glob("*/*/model.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture
def whole_run(
    tiny_recipe: Callable[..., Path], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> tuple[Path, Path]:
    recipe, out = tiny_recipe(), tmp_path / "whole"
    done = command("run", recipe, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe, out


def test_a_run_leaves_what_the_design_says(
    whole_run: tuple[Path, Path], command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    recipe, out = whole_run
    content = results(out)
    assert content["schema"] == 1
    models = content["models"]
    assert set(models) == {  # type: ignore[arg-type]
        "base", "expert:search", "expert:sts", "expert:topics", "joint:proportional",
        "merge:average", "merge:task_arithmetic", "merge:self_positioning",
    }  # fmt: skip
    for model in models.values():  # type: ignore[attr-defined]
        assert set(model["scores"]) == {"stsbenchmark", "xquad-en"}
        assert model["mean"] == pytest.approx(sum(model["by_type"].values()) / 2)
    cost = models["merge:self_positioning"]["cost"]  # type: ignore[index]
    assert cost["includes"] == ["expert:search", "expert:sts", "expert:topics"]
    assert cost["examples"] > sum(models[key]["cost"]["examples"] for key in cost["includes"])  # type: ignore[index]
    history = (out / "position/history.jsonl").read_text().splitlines()
    coefficients = json.loads((out / "position/coefficients.json").read_text())
    assert len(history) == coefficients["steps"] and set(json.loads(history[0])["losses"]) == {
        "search",
        "sts",
        "topics",
    }
    assert load_recipe(out / "recipe.yaml") == load_recipe(recipe), "every default is written out"
    assert "Self Positioning" in (out / "report.html").read_text()
    assert (out / "merged/self_positioning/README.md").read_text().count("base_model_relation: merge") == 1
    assert not [path for path in out.rglob("*") if "partial" in path.name or path.name.endswith(".work")]
    again = command("run", recipe, "--out", out)
    assert again.returncode == 0 and "] training " not in again.stderr and "Gram matrix" not in again.stderr


def run_and_kill(recipe: Path, out: Path, after: float) -> bool:
    """Start a run, kill -9 it after some seconds; whether it had ended before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "scalemerge", "run", str(recipe), "--out", str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=after) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


@pytest.mark.slow
def test_killed_five_times_and_resumed_it_ends_the_same(
    whole_run: tuple[Path, Path], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    recipe, whole = whole_run
    generator = random.Random(int(os.environ.get("KILL_SEED", "0")))
    began = time.monotonic()
    for _ in range(5):
        run_and_kill(recipe, tmp_path / "parts", generator.uniform(4, 14))
    done = command("run", recipe, "--out", tmp_path / "parts")
    assert done.returncode == 0, done.stderr[-3000:]
    assert products(whole) == products(tmp_path / "parts")
    first, second = results(whole)["models"], results(tmp_path / "parts")["models"]
    assert {k: v["scores"] for k, v in first.items()} == {k: v["scores"] for k, v in second.items()}  # type: ignore[attr-defined]
    assert time.monotonic() - began < 600
