"""A lock left by a killed process goes; one that a process holds stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scalemerge.training import build_locks
from scalemerge.training.build_locks import remove_stale_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir(parents=True)
    return path


def test_a_lock_goes_with_the_process_that_held_it(lock: Path, tmp_path: Path) -> None:
    """torch's own lock: held, nothing is removed; after kill -9 it is."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert remove_stale_locks(tmp_path, pause=0.05) == []
        assert lock.exists()
    finally:
        holder.kill()
        holder.communicate()
    assert lock.exists()
    assert remove_stale_locks(tmp_path, pause=0.05) == [lock]
    assert not lock.exists()


def test_a_lock_taken_again_in_between_stays(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()

    def taken_again(seconds: float) -> None:
        other = lock.with_name("other")
        other.touch()
        other.rename(lock)

    monkeypatch.setattr(time, "sleep", taken_again)
    assert remove_stale_locks(tmp_path) == []
    assert lock.exists()


def test_a_young_lock_on_a_network_file_system_stays(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder may be another machine's."""
    monkeypatch.setattr(build_locks, "_on_network", lambda path: True)
    lock.touch()
    assert remove_stale_locks(tmp_path, pause=0.0) == []
    old = time.time() - build_locks.PATIENCE_SECONDS - 1
    os.utime(lock, (old, old))
    assert remove_stale_locks(tmp_path, pause=0.0) == [lock]


def test_the_folder_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    assert remove_stale_locks(pause=0.0) == [tmp_path / "cpu_adam" / "lock"]
