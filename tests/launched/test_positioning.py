"""`accelerate launch -m scalemerge position` on a cluster of processes: two "machines" over loopback, a rank that is
slow, one that dies, ranks that disagree; and always the coefficients that one process finds."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
CHANGES: dict[str, Any] = {
    "positioning.steps": 60,
    "positioning.patience": 60,
    "positioning.checkpoint_every": 5,
    "positioning.sharding": "sharded",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, recipe_writer: Callable[..., Path]) -> Path:
    return recipe_writer(tmp_path_factory.mktemp("recipe") / "recipe.yaml", **CHANGES)


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its experts, trained in this process."""
    from scalemerge.pipeline import prepare, train_experts
    from scalemerge.recipe import load_recipe

    out = tmp_path_factory.mktemp("trained")
    train_experts(prepare(load_recipe(recipe), out, evaluation=False))
    return out


@pytest.fixture
def fresh(trained: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`fresh(name)`: a folder that holds the experts and nothing else."""

    def make(name: str) -> Path:
        shutil.copytree(trained / "experts", tmp_path / name / "experts")
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def alone(recipe: Path, trained: Path) -> dict[str, Any]:
    """What one process finds."""
    from scalemerge.pipeline import position, prepare
    from scalemerge.recipe import load_recipe

    position(prepare(load_recipe(recipe), trained, evaluation=False))
    return learned(trained)


def learned(out: Path) -> dict[str, Any]:
    found = dict(json.loads((out / "position" / "coefficients.json").read_text()))
    lines = (out / "position" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(found["steps"]))
    assert not (out / "position" / "state.safetensors").exists()
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float((torch.tensor(one["c"]["global"]) - torch.tensor(other["c"]["global"])).abs().max())


@pytest.fixture
def machines(start: Callable[..., Any], tmp_path: Path, free_port: int) -> Callable[..., list[Any]]:
    """`machines(recipes, out)`: a launcher for each recipe, of two processes each, joined over loopback."""

    def launch(recipes: list[Path], out: Path) -> list[Any]:
        count = len(recipes)
        common = ["--num_machines", str(count), "--num_processes", str(2 * count)]
        common += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port)]
        config = CONFIGS / "multi_node_ddp.yaml"
        return [
            start(recipe, out, config, *common, "--machine_rank", str(rank), cwd=tmp_path, verb="position")
            for rank, recipe in enumerate(recipes)
        ]

    return launch


def test_two_machines_find_what_one_process_finds(
    recipe: Path, fresh: Callable[[str], Path], machines: Callable[..., list[Any]], alone: dict[str, Any]
) -> None:
    """Four ranks on two machines, one of them slow: it is stopped for three seconds in the middle."""
    out = fresh("cluster")
    runs = machines([recipe, recipe], out)
    runs[0].wait_for_step(5)
    slow = runs[1].ranks()[3]
    slow.send_signal(signal.SIGSTOP)
    time.sleep(3)
    slow.send_signal(signal.SIGCONT)
    assert [run.wait() for run in runs] == [0, 0], "\n\n".join(run.output[-3000:] for run in runs)
    assert "sharded over 4 ranks" in runs[0].output
    assert difference(learned(out), alone) < 1e-5
    assert learned(out)["key"] == alone["key"]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_and_the_search_goes_on(
    victim: int, recipe: Path, fresh: Callable[[str], Path], start: Callable[..., Any], alone: dict[str, Any]
) -> None:
    out = fresh("killed")
    run = start(recipe, out, "ddp", verb="position")
    run.wait_for_step(12)
    process = run.ranks()[victim]
    killed = time.monotonic()
    process.send_signal(signal.SIGKILL)
    assert run.wait(60) == 1
    print(f"rank {victim} killed: all over after {time.monotonic() - killed:.1f} s")
    (error,) = run.errors
    assert re.match(rf"error: rank {victim} \(\S+, process {process.pid}\) died or lost its connection", error), error
    assert not (out / "position" / "coefficients.json").exists()
    again = start(recipe, out, "ddp", verb="position")
    assert again.wait() == 0, again.output[-3000:]
    assert re.search(r"resumed at step \d+ of 60", again.output)
    assert difference(learned(out), alone) < 1e-5


@pytest.mark.slow
def test_sigterm_saves_and_the_search_goes_on(
    recipe: Path, fresh: Callable[[str], Path], start: Callable[..., Any], alone: dict[str, Any]
) -> None:
    out = fresh("asked")
    run = start(recipe, out, "ddp", verb="position")
    run.wait_for_step(8)
    for process in run.ranks().values():
        process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0, run.output[-3000:]
    (step,) = re.findall(r"stopped by SIGTERM, saved at step (\d+) of 60", run.output)
    again = start(recipe, out, "ddp", verb="position")
    assert again.wait() == 0, again.output[-3000:]
    assert f"resumed at step {step} of 60" in again.output
    assert difference(learned(out), alone) < 1e-5


def test_ranks_with_different_recipes_are_refused(
    recipe: Path, recipe_writer: Callable[..., Path], tmp_path: Path, fresh: Callable[[str], Path],
    machines: Callable[..., list[Any]],
) -> None:  # fmt: skip
    other = recipe_writer(tmp_path / "other.yaml", **CHANGES, **{"positioning.learning_rate": 0.01})
    out = fresh("disagree")
    runs = machines([recipe, other], out)
    codes = [run.wait(120) for run in runs]
    assert all(codes), codes
    shown = runs[0].output + runs[1].output
    assert re.search(r"error: recipe: rank 0 has \w+, rank 2 has \w+; start every rank with the same recipe", shown)
    assert not (out / "position").exists() or not list((out / "position").glob("coefficients*"))


def test_an_engine_that_shards_itself_is_refused(
    recipe: Path, fresh: Callable[[str], Path], start: Callable[..., Any]
) -> None:
    run = start(recipe, fresh("zero"), "zero3", verb="position")
    assert run.wait(120) != 0
    assert "asks for DeepSpeed, but positioning shards by itself" in run.errors[0]
    assert "accelerate_configs/ddp.yaml" in run.errors[0]
