"""Locks that killed processes left in torch's folder of compiled extensions.

DeepSpeed compiles its C++ operators on first use, and looks them up there ever after, through
`torch.utils.cpp_extension.load`, which guards each folder with a file named `lock`. A process killed in between leaves
that file, and every later run waits for it without a word and without end.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse.sshfs", "fuse.glusterfs"}
PATIENCE_SECONDS = 15 * 60
"""A lock on a network file system may be held on another machine, which cannot be seen: left alone for so long."""


def remove_stale_locks(root: Path | None = None, pause: float = 0.5) -> list[Path]:
    """Remove the locks that no living process holds; the removed paths.

    root: the folder of compiled extensions, default torch's. A lock must be seen twice, `pause` seconds apart, as the
    same unheld file, so that one that is just being let go and taken again is never removed.
    """
    root = root or extensions_root()
    if not (suspects := _unheld(_locks(root))):
        return []
    time.sleep(pause)
    removed = []
    for path, inode in _unheld(_locks(root)).items():
        if suspects.get(path) != inode:
            continue
        path.unlink(missing_ok=True)
        logger.warning("%s: removed; the process that held it was killed, and every later run would wait", path)
        removed.append(path)
    return removed


def extensions_root() -> Path:
    """TORCH_EXTENSIONS_DIR, else torch's folder in the user's cache."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _locks(root: Path) -> list[Path]:
    return [*root.glob("*/lock"), *root.glob("*/*/lock")]


def _unheld(locks: Iterable[Path]) -> dict[Path, int]:
    """Lock files that no process on this machine has open, with their inodes."""
    found = {}
    for path in locks:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if not _on_network(path) or time.time() - status.st_mtime > PATIENCE_SECONDS:
            found[path] = status.st_ino
    if found:
        held = _open_files()
        found = {path: inode for path, inode in found.items() if str(path.resolve()) not in held}
    return found


def _open_files() -> set[str]:
    """Paths of the regular files that this user's processes have open."""
    import psutil

    paths: set[str] = set()
    for process in psutil.process_iter():
        try:
            paths.update(file.path for file in process.open_files())
        except psutil.Error:
            continue
    return paths


def _on_network(path: Path) -> bool:
    import psutil

    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    at = next((str(parent) for parent in path.resolve().parents if str(parent) in mounts), "/")
    return mounts.get(at, "") in NETWORK
