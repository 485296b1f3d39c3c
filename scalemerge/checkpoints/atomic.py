"""Writing files and folders so that nothing partial is ever mistaken for a whole one.

Everything is written under a temporary name beside its place and renamed when complete. A rename within one file system
is atomic, so a reader sees the old file, or the new one, or none.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from scalemerge.errors import InputError

PARTIAL = ".partial"
RECORD = "scalemerge.json"  # in the folder of every model made here: the key of what decided it, and its cost


def explain_os_error(error: OSError, path: Path) -> InputError:
    """One line for what the operating system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{path}: the disk is full; free space or write elsewhere (--out)")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{path}: not writable ({error.strerror}); give a folder you may write to (--out)")
    return InputError(f"{path}: cannot be written ({error.strerror}); give another folder (--out)")


def require_writable(folder: Path) -> None:
    """Make the folder and write a byte into it, so that a bad place is refused before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{PARTIAL}-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise explain_os_error(error, folder) from None


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when the block ends without an error. Raises InputError when the disk
    refuses."""
    temporary = path.with_name(f"{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, path) from None
    finally:
        remove_quietly(temporary)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


def remove_quietly(path: Path) -> None:
    """Remove a file if it is there and can be removed: tidying up must not hide the error that led to it."""
    with suppress(OSError):
        path.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there: by another name first, so that one removed by half is never taken for a whole
    one. What a killed removal left under that name goes, too."""
    going = folder.with_name(f"{PARTIAL}-removed-{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    with suppress(OSError):
        folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the right folder") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and run the stage again") from None


def open_log(path: Path, keep: int) -> TextIO:
    """A log of one line a step, open for appending after its first `keep` lines: what a resumed run still stands by."""
    kept = path.read_text(encoding="utf-8").splitlines()[:keep] if path.is_file() else []
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return open(path, "a", encoding="utf-8")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error.

    What stood under the name before is replaced; leftovers of an interrupted writer are removed first.
    """
    temporary = final.with_name(f"{final.name}{PARTIAL}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        old = final.with_name(f"{final.name}{PARTIAL}-old")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, final) from None
