"""Two machines: two launchers on one, joined over the loopback address, with the very file that real machines use.

They share the file system, as real ones must for the data and for resuming; rank 0 alone writes.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
CHANGES: dict[str, Any] = {"training.batch_size": 15, "training.learning_rate": 1e-4}


@pytest.fixture
def machines(start: Callable[..., Any], tmp_path: Path, free_port: int) -> Callable[..., list[Any]]:
    """`machines(recipe, outs, config)`: the launchers of machine 0 and 1, each in a working folder of its own."""

    def launch(recipe: Path, outs: list[Path], config: str = "multi_node_zero3.yaml") -> list[Any]:
        common = ["--num_machines", "2", "--num_processes", "2"]
        common += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port)]
        runs = []
        for rank, out in enumerate(outs):
            folder = tmp_path / f"machine-{rank}"
            folder.mkdir(exist_ok=True)
            runs.append(start(recipe, out, CONFIGS / config, *common, "--machine_rank", str(rank), cwd=folder))
        return runs

    return launch


@pytest.mark.parametrize(
    "config", ["multi_node_zero3.yaml", pytest.param("multi_node_ddp.yaml", marks=pytest.mark.slow)]
)
def test_two_machines_train_the_expert_of_one_process(
    config: str,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    machines: Callable[..., list[Any]],
    finish: Callable[..., Path],
    same_weights: Callable[..., None],
) -> None:
    recipe = tiny_recipe(**CHANGES)
    shared, unused = tmp_path / "shared", tmp_path / "unused"
    runs = machines(recipe, [shared, unused], config)  # the second is told another folder, to see what it writes
    assert [run.wait() for run in runs] == [0, 0], "\n\n".join(run.output[-3000:] for run in runs)
    expert = shared / "experts" / "search"
    engine = re.sub(r"multi_node_(\w+)\.yaml", r"\1", config)
    assert json.loads((expert / "scalemerge.json").read_text())["engine"] == engine
    assert [path.name for path in expert.parent.iterdir()] == ["search"]
    assert not [path for path in unused.rglob("*") if path.is_file()], "machine 1 writes nothing"
    assert not any(list((tmp_path / f"machine-{rank}").iterdir()) for rank in range(2))
    same_weights(expert, finish(recipe, tmp_path / "one", None), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_machine_ends_the_other_which_names_it(
    victim: int,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    machines: Callable[..., list[Any]],
    only_whole_folders: Callable[[Path], None],
) -> None:
    recipe = tiny_recipe(**CHANGES, **{"training.max_steps": 60, "training.epochs": 10})
    runs = machines(recipe, [tmp_path / "shared", tmp_path / "shared"])
    runs[0].wait_for_step(4)
    (rank, process), *_ = runs[victim].ranks().items()
    assert rank == victim
    began = time.monotonic()
    runs[victim].kill()
    assert runs[1 - victim].wait(60) == 1
    print(f"machine {victim} killed: the other over after {time.monotonic() - began:.1f} s")
    only_whole_folders(tmp_path / "shared")
    (error,) = runs[1 - victim].errors
    assert f"rank {victim} (" in error and f"process {process.pid})" in error and "died" in error
    again = machines(recipe, [tmp_path / "shared", tmp_path / "shared"])
    assert [run.wait() for run in again] == [0, 0], again[0].output[-3000:]
    assert "resumed at step" in again[0].output


@pytest.mark.slow
def test_one_request_to_stop_stops_all_machines(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    machines: Callable[..., list[Any]],
    only_whole_folders: Callable[[Path], None],
) -> None:
    recipe = tiny_recipe(**CHANGES, **{"training.max_steps": 60, "training.epochs": 10})
    runs = machines(recipe, [tmp_path / "shared", tmp_path / "shared"])
    runs[0].wait_for_step(4)
    for process in runs[1].ranks().values():
        process.send_signal(signal.SIGTERM)
    assert [run.wait(60) for run in runs] == [0, 0]
    assert "stopped by SIGTERM, saved at step" in runs[0].output
    only_whole_folders(tmp_path / "shared")
