"""The built-in suite `docs`: training and evaluation data mined from the packages that are installed anyway.

Four kinds of task come out of one pass over the docstrings: search (summary -> rest of the docstring, summary -> code),
paraphrase (functions of one name in two libraries), classification and clustering (which part of a library). They pull
an embedding model in different directions, which is what the merge experiments need, and cost no download.

The split is by package: nothing of TEST_PACKAGES is trained on, and a training text that also occurs in a test or
validation package is dropped. The result is an ordinary data folder (gzip'd JSON Lines, BEIR-like retrieval folders),
so nothing downstream knows that it was mined. It depends on the versions installed, which is why these are part of the
cache key and listed in `manifest.json`; scores compare only between suites of one key.

A build happens in a folder of its own name and is renamed when complete, so a killed build leaves no suite and two
builders at once leave one.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalemerge.data.docs_mining import STANDARD_LIBRARY, Documented, SearchRoots, mine_package
from scalemerge.data.docs_rows import Limits, Rows, assemble, digest, is_useful_summary
from scalemerge.errors import InputError

MINER_VERSION = 1
"""Part of the cache key: raise it whenever a change here or in the mining changes a text."""

TRAIN_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "sentence_transformers",
    "mteb",
    "numpy",
    "sklearn",
    "matplotlib",
    "PIL",
    "fontTools",
    "sympy",
    "mpmath",
    "pydantic",
    "fsspec",
    "rich",
    "jinja2",
    STANDARD_LIBRARY,
)
VALIDATION_PACKAGES = ("networkx",)
TEST_PACKAGES = ("scipy", "pandas", "polars", "narwhals")
"""Three data frame libraries, which share many names (paraphrases), and SciPy, whose modules are clear topics."""

DOCS_TASKS: list[tuple[str, str]] = [
    ("docs-search", "retrieval"),
    ("code-search", "retrieval"),
    ("docs-paraphrase", "pair classification"),
    ("docs-topics", "classification"),
    ("docs-modules", "clustering"),
]
"""(folder, task type) of what the suite evaluates."""

Progress = Callable[[str, int, int], None]
"""Called with the package about to be read, how many are done, and how many there are."""


def build_docs_suite(
    cache_dir: Path | None = None,
    *,
    progress: Progress | None = None,
    roots: SearchRoots | None = None,
    limits: Limits | None = None,
) -> Path:
    """Return the folder of the suite for the packages installed here, building it if it is not in the cache.

    Raises InputError if the installed packages give too few texts.
    """
    roots = roots or SearchRoots.of_this_interpreter()
    limits = limits or Limits()
    splits = {"train": TRAIN_PACKAGES, "validation": VALIDATION_PACKAGES, "test": TEST_PACKAGES}
    wanted = [package for packages in splits.values() for package in packages]
    versions = {package: roots.version(package) for package in wanted if roots.find(package) is not None}
    key = digest([MINER_VERSION, list(splits.items()), versions, platform.python_version(), asdict(limits)])[:16]
    folder = (cache_dir or _default_cache_dir()) / "docs-suite" / key
    if _is_complete(folder):
        return folder

    mined: dict[str, list[Documented]] = {split: [] for split in splits}
    unreadable: dict[str, int] = {}
    done = 0
    for split, packages in splits.items():
        for package in packages:
            root = roots.find(package)
            if root is None:
                continue
            if progress:
                progress(package, done, len(versions))
            entries, unreadable[package] = mine_package(root, package)
            mined[split] += [entry for entry in entries if is_useful_summary(entry.summary)]
            done += 1
    if progress:
        progress("", done, len(versions))
    files = assemble(mined["train"], mined["validation"], mined["test"], limits)
    manifest = {
        "suite": "docs",
        "key": key,
        "miner_version": MINER_VERSION,
        "python": platform.python_version(),
        "packages": {split: {p: versions[p] for p in names if p in versions} for split, names in splits.items()},
        "missing_packages": [package for package in wanted if package not in versions],
        "unreadable_files": unreadable,
        "limits": asdict(limits),
        "rows": {name: len(rows) for name, rows in files.items()},
    }
    _require_enough(manifest, limits)
    return _publish(folder, files, manifest)


def _default_cache_dir() -> Path:
    return Path(os.environ.get("SCALEMERGE_CACHE") or Path.home() / ".cache" / "scalemerge")


def _require_enough(manifest: dict[str, Any], limits: Limits) -> None:
    """An installation with too few packages is the user's to mend, and is told before anything is written."""
    short = {name: n for name, n in manifest["rows"].items() if n < limits.min_rows and "validation" not in name}
    if short:
        listed = ", ".join(f"{name} {count}" for name, count in short.items())
        missing = ", ".join(manifest["missing_packages"]) or "none"
        raise InputError(
            f"docs suite: too few texts in the installed packages (fewer than {limits.min_rows} rows in {listed}); "
            f"packages not found: {missing}. Install them with: pip install 'scalemerge[demo]'"
        )


def _is_complete(folder: Path) -> bool:
    """Whether a suite is whole: its manifest, written last, and every file that the manifest lists."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / name).is_file() for name in manifest["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _publish(folder: Path, files: Rows, manifest: dict[str, Any]) -> Path:
    """Write everything under a private name, then rename: the folder exists whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    building = folder.parent / f".building-{folder.name}-{secrets.token_hex(8)}"
    try:
        for name, rows in files.items():
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_encoded(name, rows))
        (building / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists() and not _is_complete(folder):  # somebody deleted files in it
            folder.rename(building / "damaged")
        try:
            building.rename(folder)
        except OSError:
            if not _is_complete(folder):  # otherwise another builder was first, with the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    return folder


def _remove_abandoned(parent: Path, age_seconds: float = 24 * 3600) -> None:
    """Delete what killed builds left behind a day ago or longer; a younger one may be a build at work."""
    for path in parent.glob(".building-*"):
        try:
            old = time.time() - path.stat().st_mtime > age_seconds
        except OSError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)


def _encoded(name: str, rows: list[dict[str, Any]]) -> bytes:
    """JSON Lines in gzip without a time stamp, or tab separated columns with a header; bytes depend on rows only."""
    if name.endswith(".tsv"):
        header = ("query-id", "corpus-id", "score")
        lines = ["\t".join(header), *("\t".join(str(row[column]) for column in header) for row in rows)]
        return ("\n".join(lines) + "\n").encode()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)
