"""What may happen to a run from outside: kill -9 of a rank or of all, a hung rank, SIGTERM; and the run goes on to the
same losses, gradient norms and weights, as if nothing had been."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

STEPS = 30
CHANGES: dict[str, Any] = {
    "training.max_steps": STEPS,
    "training.epochs": 10,
    "training.chunk_tokens": 100,
    "training.dropout": 0.1,
}


def compared(folder: Path, records: Callable[[Path], list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """What a resumed run must say again of every step, to the last bit: it runs one thread."""
    keys = ("step", "task", "loss", "gradient_norm", "learning_rate", "tokens")
    return [tuple(record[key] for key in keys) for record in records(folder)]


def steps_logged(out: Path) -> int:
    log = out / "experts" / "search.work" / "training.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, recipe_writer: Callable[..., Path]) -> Path:
    return recipe_writer(tmp_path_factory.mktemp("recipe") / "recipe.yaml", **CHANGES)


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of undisturbed runs, made by the first test that needs one."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {"zero2": folder / "zero2", "plain": folder / "plain"}


@pytest.fixture
def undisturbed(recipe: Path, outs: dict[str, Path], finish: Callable[..., Path]) -> Path:
    """The expert of ZeRO-2 on two processes that nobody disturbed."""
    expert = outs["zero2"] / "experts" / "search"
    return expert if expert.exists() else finish(recipe, outs["zero2"], "zero2")


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_other_which_names_it(
    victim: int,
    recipe: Path,
    tmp_path: Path,
    undisturbed: Path,
    start: Callable[..., Any],
    finish: Callable[..., Path],
    records: Any,
    same_weights: Callable[..., None],
    only_whole_folders: Callable[[Path], None],
) -> None:
    run = start(recipe, tmp_path, "zero2")
    run.wait_for_step(9)
    process = run.ranks()[victim]
    killed = time.monotonic()
    process.send_signal(signal.SIGKILL)
    assert run.wait(60) == 1
    seconds = time.monotonic() - killed
    print(f"rank {victim} killed: all over after {seconds:.1f} s")
    only_whole_folders(tmp_path)
    (error,) = run.errors
    assert re.match(rf"error: rank {victim} \(\S+, process {process.pid}\) died or lost its connection", error), error
    again = finish(recipe, tmp_path, "zero2")
    assert compared(again, records) == compared(undisturbed, records)
    same_weights(again, undisturbed)


@pytest.mark.slow
def test_ten_random_kills_change_no_bit(
    recipe: Path,
    tmp_path: Path,
    undisturbed: Path,
    start: Callable[..., Any],
    records: Any,
    same_weights: Callable[..., None],
    only_whole_folders: Callable[[Path], None],
) -> None:
    generator = random.Random(7)
    port = ("--main_process_port", "29631")  # the same command each time: the port too
    victims = ["rank 0"] * 3 + ["rank 1"] * 3 + ["all"] * 4
    generator.shuffle(victims)
    for number, victim in enumerate(victims):
        before = steps_logged(tmp_path)
        run = start(recipe, tmp_path, "zero2", *port)
        if number % 5 == 4:  # while it starts: imports, model, checkpoint
            until = time.monotonic() + generator.uniform(2, 12)
            while time.monotonic() < until and "resumed at step" not in run.output:
                time.sleep(0.02)
            while not run.ranks() and run.process.poll() is None:
                time.sleep(0.02)
        else:  # some steps on, which may be within a checkpoint
            run.wait_for_step(min(max(2 * number + 2, before + 1), STEPS - 4))
            time.sleep(generator.uniform(0, 0.4))
        steps, began = run.steps(), time.monotonic()
        if victim == "all":
            run.kill()
        else:
            ranks = run.ranks()
            ranks.get(int(victim[-1]), next(iter(ranks.values()))).send_signal(signal.SIGKILL)
        code = run.wait(60)
        seconds = time.monotonic() - began
        print(f"{number:2} {victim:6} at {steps:2} steps: code {code:3}, {seconds:4.1f} s; {run.errors}", flush=True)
        only_whole_folders(tmp_path)
        assert code == (-signal.SIGKILL if victim == "all" else 1)
    last = start(recipe, tmp_path, "zero2", *port)
    assert last.wait() == 0, last.output[-3000:]
    only_whole_folders(tmp_path)
    final = tmp_path / "experts" / "search"
    assert compared(final, records) == compared(undisturbed, records)
    same_weights(final, undisturbed)
    assert [path.name for path in final.parent.iterdir()] == ["search"], "nothing is left lying about"


@pytest.mark.slow
@pytest.mark.parametrize("writing", ["search.weights", "search.partial", "search.work/partial-*"])
def test_killed_while_a_folder_is_written(
    writing: str,
    recipe: Path,
    tmp_path: Path,
    outs: dict[str, Path],
    start: Callable[..., Any],
    finish: Callable[..., Path],
    records: Any,
    same_weights: Callable[..., None],
    only_whole_folders: Callable[[Path], None],
) -> None:
    """Aimed at the moments that random kills rarely meet: the expert's, and a checkpoint's."""
    caught = 0
    for milliseconds in (0, 0, 0, 4, 8, 16):
        run = start(recipe, tmp_path, None)
        while not list((tmp_path / "experts").glob(writing)) and run.process.poll() is None:
            time.sleep(0.0005)
        time.sleep(milliseconds / 1000)
        run.process.kill()  # one process: no children to look for, which takes longer than the writing
        run.kill()
        caught += bool(list((tmp_path / "experts").glob(writing)))
        only_whole_folders(tmp_path)
        if (tmp_path / "experts" / "search").exists():
            if caught:
                break
            shutil.rmtree(tmp_path / "experts")  # too late: once more from the start
    assert caught, "no kill met the writing"
    whole = outs["plain"] / "experts" / "search"
    whole = whole if whole.exists() else finish(recipe, outs["plain"], None)
    again = finish(recipe, tmp_path, None)
    assert compared(again, records) == compared(whole, records)
    same_weights(again, whole)
    assert [path.name for path in again.parent.iterdir()] == ["search"], "nothing is left lying about"


@pytest.mark.slow
def test_a_hung_rank_is_named(recipe: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    run = start(recipe, tmp_path, "zero2")
    run.wait_for_step(3)
    hung = run.ranks()[1]
    began = time.monotonic()
    hung.suspend()
    assert run.wait(150) == 1
    print(f"rank 1 hung: all over after {time.monotonic() - began:.1f} s")
    assert run.errors and run.errors[0].startswith("error: rank 1 (") and f"process {hung.pid}" in run.errors[0]


@pytest.mark.slow
def test_ranks_without_their_launcher_end(
    tiny_recipe: Callable[..., Path], tmp_path: Path, start: Callable[..., Any]
) -> None:
    """Else they would go on writing beside the run that is started in their place."""
    endless = tiny_recipe(**{**CHANGES, "training.max_steps": 2000, "training.epochs": 500})
    run = start(endless, tmp_path, "zero2")
    run.wait_for_step(2)
    ranks = list(run.ranks().values())
    assert len(ranks) == 2
    began = time.monotonic()
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(10)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    print(f"launcher killed: ranks gone after {time.monotonic() - began:.1f} s")
    assert not alive and not (tmp_path / "experts" / "search").exists()
    assert run.errors and all("launcher" in error for error in run.errors)


def preempt(run: Any, processes: list[psutil.Process], step: int) -> None:
    """SIGTERM to the training processes; all must save and leave with code 0."""
    run.wait_for_step(step)
    for process in processes or list(run.ranks().values()):
        process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0, run.output[-3000:]
    assert "stopped by SIGTERM, saved at step" in run.output and not run.errors


def test_sigterm_saves_one_process_which_goes_on(
    recipe: Path,
    tmp_path: Path,
    outs: dict[str, Path],
    start: Callable[..., Any],
    finish: Callable[..., Path],
    records: Any,
    same_weights: Callable[..., None],
    only_whole_folders: Callable[[Path], None],
) -> None:
    whole = finish(recipe, outs["plain"], None)
    run = start(recipe, tmp_path, None)
    run.wait_for_step(5)
    preempt(run, [psutil.Process(run.process.pid)], 5)
    only_whole_folders(tmp_path)
    assert list(run.history.parent.glob("step-*")) and not (tmp_path / "experts" / "search").exists()
    again = finish(recipe, tmp_path, None)
    assert compared(again, records) == compared(whole, records)
    same_weights(again, whole)


@pytest.mark.slow
def test_sigterm_saves_all_ranks_which_go_on(
    recipe: Path,
    tmp_path: Path,
    undisturbed: Path,
    start: Callable[..., Any],
    finish: Callable[..., Path],
    records: Any,
    same_weights: Callable[..., None],
    only_whole_folders: Callable[[Path], None],
) -> None:
    preempt(start(recipe, tmp_path, "zero2"), [], 5)
    only_whole_folders(tmp_path)
    again = finish(recipe, tmp_path, "zero2")
    assert compared(again, records) == compared(undisturbed, records)
    same_weights(again, undisturbed)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_too_but_its_code_is_1(
    recipe: Path, tmp_path: Path, start: Callable[..., Any], only_whole_folders: Callable[[Path], None]
) -> None:
    run = start(recipe, tmp_path, "zero2")
    run.wait_for_step(5)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60) == 1
    assert "stopped by SIGTERM, saved at step" in run.output
    only_whole_folders(tmp_path)
    assert list(run.history.parent.glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, "zero3"])
def test_a_checkpoint_goes_on_under_another_engine(
    engine: str | None,
    recipe: Path,
    tmp_path: Path,
    start: Callable[..., Any],
    records: Any,
) -> None:
    """Dropout is the one thing that depends on the number of ranks, so these runs have none."""
    text = (
        recipe.read_text()
        .replace("dropout: 0.1", "dropout: 0.0")
        .replace("learning_rate: 0.001", "learning_rate: 0.0001")
    )
    calm = tmp_path / "recipe.yaml"
    calm.write_text(text)
    whole = start(calm, tmp_path / "whole", "zero2")
    assert whole.wait() == 0, whole.output[-3000:]
    preempt(start(calm, tmp_path, "zero2"), [], 9)
    other = start(calm, tmp_path, engine)
    assert other.wait() == 0, other.output[-3000:]
    name, world = (engine, 2) if engine else ("plain", 1)
    assert f"the checkpoint is of zero2 on 2 rank(s), this run is {name} on {world}: same batches" in other.output
    told, expected = (records(folder / "experts" / "search") for folder in (tmp_path, tmp_path / "whole"))
    for key in ("step", "task", "tokens", "learning_rate"):
        assert [record[key] for record in told] == [record[key] for record in expected], key
    for key in ("loss", "gradient_norm"):
        assert [record[key] for record in told] == pytest.approx([record[key] for record in expected], abs=1e-4), key
