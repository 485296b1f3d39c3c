"""Runs of the command line under `accelerate launch`, to be watched, killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from scalemerge.encoder import Encoder

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
PATIENCE = 400.0  # seconds: a launch takes 15 on an idle machine of two cores, a minute on a busy one
VARIABLES = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
}


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Launched:
    """One `scalemerge train` of task search, or `scalemerge position`: its launcher (none for one plain process), its
    ranks, what it printed. history: the file that gets a line a step."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: dict[str, str], history: Path, cwd: Path
    ) -> None:
        self.log, self.history = log, history
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                list(command),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def ranks(self) -> dict[int, psutil.Process]:
        """The living processes that train, by rank."""
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "scalemerge" in child.cmdline() and "RANK" in (variables := child.environ()):
                        found[int(variables["RANK"])] = child
        return found

    def steps(self) -> int:
        with contextlib.suppress(OSError):
            return self.history.read_bytes().count(b"\n")
        return 0

    def wait_for_step(self, count: int) -> None:
        """Until the log has so many steps. Fails when the run ends before."""
        deadline = time.monotonic() + PATIENCE
        while self.steps() < count:
            assert self.process.poll() is None, f"ended before step {count}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"no step {count}:\n{self.output[-4000:]}"
            time.sleep(0.02)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The launcher's exit code."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """`kill -9` of everything at once, the launcher first so that it cannot tidy up."""
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [psutil.Process(self.process.pid)]
            tree += tree[0].children(recursive=True)
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(tree[1:], timeout=10)
        self.process.wait(10)


Start = Callable[..., Launched]


@pytest.fixture
def free_port() -> int:
    return find_port()


@pytest.fixture
def environment() -> dict[str, str]:
    """Variables for a process of one thread that finds scalemerge."""
    return dict(VARIABLES)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(recipe, out, "zero2", *options)`: a run in the background; whatever still lives at the end is killed.

    The engine is a file of accelerate_configs without _cpu.yaml, a path, or None for one plain process. environment:
    variables to set (None: to unset). verb: train, of task search, or position.
    """
    runs: list[Launched] = []

    def launch(
        recipe: Path,
        out: Path,
        engine: str | Path | None,
        *options: str,
        environment: dict[str, str | None] | None = None,
        cwd: Path | None = None,
        verb: str = "train",
    ) -> Launched:
        variables: dict[str, str | None] = {**VARIABLES, **(environment or {})}
        out.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-u", "-m"]
        if engine is not None:
            config = CONFIGS / f"{engine}_cpu.yaml" if isinstance(engine, str) else engine
            launcher += ["accelerate.commands.launch", "--config_file", str(config)]
            if "--main_process_port" not in options:
                launcher += ["--main_process_port", str(find_port())]
            launcher += [*options, "-m"]
        arguments = ["scalemerge", verb, str(recipe), *(["--task", "search"] if verb == "train" else [])]
        arguments += ["--out", str(out)]
        history = out / "experts" / "search.work" / "training.jsonl"
        if verb == "position":
            history = out / "position" / "history.jsonl"
        log = tmp_path / f"run-{len(runs)}.log"
        kept = {key: value for key, value in variables.items() if value is not None}
        runs.append(Launched([*launcher, *arguments], log, kept, history, cwd or out))
        return runs[-1]

    yield launch
    for run in runs:
        run.kill()


@pytest.fixture
def finish(start: Start) -> Callable[..., Path]:
    """`finish(...)`: like `start`, to its end; the expert's folder."""

    def run(recipe: Path, out: Path, engine: str | Path | None, *options: str, **more: Any) -> Path:
        launched = start(recipe, out, engine, *options, **more)
        code = launched.wait()
        assert code == 0, f"exit code {code}:\n{launched.output[-4000:]}"
        return out / "experts" / "search"

    return run


@pytest.fixture(scope="session")
def records() -> Callable[[Path], list[dict[str, Any]]]:
    """`records(folder)`: what a training.jsonl says of each step."""
    return lambda folder: [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def same_weights() -> Callable[..., None]:
    """`same_weights(a, b, tolerance=0)` of two model folders. Above 0 key biases are left out: softmax does not see
    them, so their gradients are rounding noise, which Adam scales to full steps."""

    def compare(first: Path, second: Path, tolerance: float = 0.0) -> None:
        one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
        assert one.keys() == other.keys()
        for name, value in one.items():
            if tolerance == 0:
                assert torch.equal(value, other[name]), name
            elif not name.endswith("key.bias"):
                difference = float((value - other[name]).abs().max())
                assert difference <= tolerance, f"{name}: {difference}"

    return compare


@pytest.fixture(scope="session")
def only_whole_folders() -> Callable[[Path], None]:
    """`only_whole_folders(out)`: the expert's folder loads or is not there, and so does every checkpoint."""

    def check(out: Path) -> None:
        final, work = out / "experts" / "search", out / "experts" / "search.work"
        if final.exists():
            Encoder.load(final)
            assert json.loads((final / "scalemerge.json").read_text())["key"]
            assert (final / "training.jsonl").is_file() and (final / "modules.json").is_file()
        for checkpoint in work.glob("step-*"):
            progress = json.loads((checkpoint / "progress.json").read_text())
            assert progress["step"] == int(checkpoint.name.removeprefix("step-"))
            with safe_open(str(checkpoint / "state.safetensors"), framework="pt") as stored:
                names = list(stored.keys())
                assert len(names) % 3 == 0 and len(names) > 30
                for name in names:
                    assert torch.isfinite(stored.get_tensor(name)).all(), name

    return check
