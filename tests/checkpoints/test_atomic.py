"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalemerge.checkpoints import atomic
from scalemerge.checkpoints.atomic import new_folder, read_json, remove_folder, require_writable, write_json, write_text
from scalemerge.errors import InputError


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "sub" / "b.txt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with new_folder(final) as folder:
        fill(folder, "new")
        assert not final.exists()
    assert names(tmp_path / "deep") == ["model"]
    assert (final / "sub" / "b.txt").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "model") as folder:
        fill(folder, "half")
        raise error
    assert names(tmp_path) == []


def test_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as folder:
        fill(folder, "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as folder:
        fill(folder, "half")
        raise RuntimeError
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "a.txt").read_text() == "old"


def test_replaced_as_a_whole(tmp_path: Path) -> None:
    """No file of the old folder is left in the new one, and none of the helpers beside it."""
    with new_folder(tmp_path / "model") as folder:
        fill(folder, "old")
        (folder / "only-old").touch()
    with new_folder(tmp_path / "model") as folder:
        fill(folder, "new")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["a.txt", "sub"]
    assert (tmp_path / "model" / "a.txt").read_text() == "new"


KILLED = """
import os, signal, sys
from pathlib import Path
from scalemerge.checkpoints.atomic import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", [False, True])
def test_killed_in_the_middle(tmp_path: Path, before: bool) -> None:
    """kill -9: the final name is absent or the old folder; the next writer clears the leftovers away."""
    final = tmp_path / "model"
    if before:
        with new_folder(final) as folder:
            fill(folder, "old")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(final)], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert final.exists() == before
    if before:
        assert (final / "a.txt").read_text() == "old"
    assert "model.partial" in names(tmp_path)
    with new_folder(final) as folder:
        assert names(folder) == []
        fill(folder, "new")
    assert names(tmp_path) == ["model"]
    assert (final / "a.txt").read_text() == "new"


@pytest.mark.parametrize("crash_at", [1, 2])
def test_killed_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int) -> None:
    """At every moment the final name is the old folder, the new one, or none: never a mixture."""
    final = tmp_path / "model"
    with new_folder(final) as folder:
        fill(folder, "old")
    calls = 0
    real = os.replace

    class Killed(BaseException):
        pass

    def replace(source, target) -> None:
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed), new_folder(final) as folder:
        fill(folder, "new")
    monkeypatch.undo()
    assert not final.exists() or (final / "a.txt").read_text() == (final / "sub/b.txt").read_text()
    with new_folder(final) as folder:
        fill(folder, "again")
    assert names(tmp_path) == ["model"], "leftovers are removed by the next writer"


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    """Root may write anywhere, so a path below a regular file stands for a folder that is not writable."""
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" / "model"

    def make() -> None:
        with new_folder(place):
            raise AssertionError("never reached")

    for action in (
        make,
        lambda: require_writable(place),
        lambda: write_text(place, "x"),
        lambda: write_json(place, {}),
    ):
        with pytest.raises(InputError, match="give another folder") as caught:
            action()
        assert str(place) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        require_writable(tmp_path)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "not writable"),
        (errno.EROFS, "not writable"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch, number: int, expected: str) -> None:
    def refuse(*arguments) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    (tmp_path / "kept.json").write_text("old")
    with pytest.raises(InputError, match=expected) as caught:
        write_json(tmp_path / "kept.json", {"new": 1})
    assert str(tmp_path / "kept.json") in str(caught.value)
    assert (tmp_path / "kept.json").read_text() == "old"
    assert names(tmp_path) == ["kept.json"], "no half-written file is left on a full disk"


def test_require_writable_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


TEXTS = st.text(alphabet=st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(content=JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_round_trip(tmp_path: Path, content) -> None:
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"nonsense"])
def test_bad_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.json: cannot be read"):
        read_json(tmp_path / "x.json")


def test_a_folder_removed_by_half_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a removal: nothing is left under the name, and the next removal takes the rest."""
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    (folder / "a").touch()
    (folder / "b").touch()
    rmtree = shutil.rmtree

    def killed(path: Path, **how: bool) -> None:
        if Path(path).exists():
            (Path(path) / "a").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []
