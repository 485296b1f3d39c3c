"""The files of the shared data layout, row by row: gzip'd or plain JSON Lines and tab-separated judgements.

Every fault is an InputError that names the file, the line, the field and the remedy.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scalemerge.errors import InputError

Row = dict[str, Any]
# Field name -> what is wrong with a value (None: nothing).
Fields = dict[str, Callable[[Any], str | None]]


def is_text(value: Any) -> str | None:
    return None if isinstance(value, str) else "is not a string"


def is_texts(value: Any) -> str | None:
    good = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
    return None if good else "is not a list of at least one string"


def is_key(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "is not a string with at least one character"


def is_label(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "is not a label (a string with at least one character)"


def is_number(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "is not a number"
    return None if math.isfinite(value) else "is not a finite number"


def is_binary(value: Any) -> str | None:
    return None if not isinstance(value, bool) and value in (0, 1) else "is not 0 or 1"


def existing_file(folder: Path, stem: str, endings: tuple[str, ...] = (".jsonl.gz", ".jsonl")) -> Path:
    for ending in endings:
        if (folder / (stem + ending)).is_file():
            return folder / (stem + ending)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; check the data folder's place")
    present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise InputError(f"{folder / (stem + endings[0])}: no such file; add it or choose another split (here: {present})")


def open_file(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open_file(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: not readable ({error}); restore the file") from None


def read_rows(path: Path, required: Fields, optional: Fields | None = None) -> list[Row]:
    """The wanted fields of every row; an optional field that is absent or null becomes None."""
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}); correct or drop the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not a JSON object; correct or drop the line")
        kept: Row = {}
        for name, problem_of in required.items():
            if name not in row:
                raise InputError(f"{path}: line {number}: field '{name}' is missing (has: {', '.join(row)}); "
                                 f"a row needs {', '.join(required)}")  # fmt: skip
            kept[name] = row[name]
            if problem := problem_of(row[name]):
                raise InputError(
                    f"{path}: line {number}: field '{name}' {problem}: {str(row[name])[:40]!r}; correct it"
                )
        for name, problem_of in (optional or {}).items():
            kept[name] = row.get(name)
            if kept[name] is not None and (problem := problem_of(kept[name])):
                raise InputError(
                    f"{path}: line {number}: field '{name}' {problem}: {str(kept[name])[:40]!r}; correct it"
                )
        rows.append(kept)
    if not rows:
        raise InputError(f"{path}: the file has no row; add rows or leave the task out")
    return rows


def read_judgements(path: Path) -> Iterator[tuple[int, tuple[str, str, int]]]:
    lines = _lines(path)
    header = next(lines, (1, ""))[1].rstrip("\r\n").split("\t")
    wanted = ["query-id", "corpus-id", "score"]
    if header != wanted:
        raise InputError(f"{path}: line 1: the header is {header}; it must be {wanted}, separated by tabs")
    for number, line in lines:
        parts = line.rstrip("\r\n").split("\t")
        try:
            query, document, score = parts
            yield number, (query, document, int(score))
        except ValueError:
            raise InputError(f"{path}: line {number}: needs query-id, corpus-id and a whole-number score, separated by "
                             f"tabs, not {parts}; correct it") from None  # fmt: skip


def unique_ids(path: Path, rows: list[Row]) -> set[str]:
    seen: set[str] = set()
    for row in rows:
        if row["_id"] in seen:
            raise InputError(f"{path}: field '_id': '{row['_id']}' occurs twice; ids must be unique")
        seen.add(row["_id"])
    return seen
