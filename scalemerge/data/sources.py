"""Reading rows: local JSONL(.gz), Parquet and CSV files, folders, BEIR-style retrieval folders and hub ids.

Everything goes through `datasets`. What comes out has one schema per task kind, whatever the columns were called, and
has been checked: the columns are there, texts are texts, scores are finite numbers, and there is at least one row.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalemerge.errors import InputError
from scalemerge.recipe import DATA_VARIABLE, Source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

#: roles of each task kind: the texts first, then the target
TEXT_ROLES = {
    "pairs": ("query", "positive"),
    "triplets": ("query", "positive"),
    "scored_pairs": ("sentence1", "sentence2"),
    "labelled_texts": ("text",),
    "retrieval": ("query", "positive"),
}
TARGETS = {"scored_pairs": "score", "labelled_texts": "label"}
_ALSO_CALLED = {
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "pos", "document", "answer"),
    "negatives": ("negatives", "negative", "neg"),
    "sentence1": ("sentence1", "text1"),
    "sentence2": ("sentence2", "text2"),
    "text": ("text", "sentence"),
    "score": ("score", "similarity_score"),
    "label": ("label", "labels"),
}
_ENDS = 1 << 16  # bytes
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


def resolve_path(source: Source, data: str | None) -> str:
    """The source's path with `{data}` and `{docs}` filled in. Raises InputError when `{data}` is not known."""
    path = source.path
    if "{data}" in path:
        if not data:
            raise InputError(f"source '{path}': {{data}} is not known; give --data DIR or set {DATA_VARIABLE}")
        path = path.replace("{data}", str(data))
    if "{docs}" in path:
        from scalemerge.data.docs_suite import build_docs_suite

        path = path.replace("{docs}", str(build_docs_suite()))
    return path


def load_rows(source: Source, kind: str, *, data: str | None = None) -> Dataset:
    """All rows of a source in the schema of `kind`.

    Columns: texts as strings; `negatives` a list of strings (kind triplets); `score` float; `label` string; `row` the
    row's number in the source. Raises InputError naming file, column or row, and the remedy.
    """
    import datasets

    where = resolve_path(source, data)
    if source.streamed:
        raise InputError(f"{where}: a stream is read as a whole only with a 'limit'; give one, or drop 'streaming'")
    if kind == "retrieval" and Path(where).is_dir():
        rows: Any = _retrieval_rows(Path(where), source.split)
    else:
        rows = open_table(where, source)
    try:
        if isinstance(rows, datasets.IterableDataset):
            rows = _take(rows, source, where)
        else:
            rows = _choose(rows, source, where)
        rows = canonical(rows, source, kind, where)
    except UnicodeDecodeError:
        raise InputError(f"{where}: holds text that is not UTF-8; convert the file") from None
    if not len(rows):
        raise InputError(f"{where}: no rows (split '{source.split}', filter {source.where or 'none'}); give a data set "
                         "that is not empty")  # fmt: skip
    return rows


def _choose(rows: Dataset, source: Source, where: str) -> Dataset:
    """The rows that pass `where`, at most `limit` of them: a fixed sample. Adds the row numbers."""
    if "row" in rows.column_names:  # another's numbers: not those an error could name
        rows = rows.remove_columns("row")
    rows = rows.add_column("row", list(range(len(rows))))
    for column, values in source.where.items():
        _check_filter(column, rows.column_names, where)
        rows = rows.filter(lambda value, allowed=values: value in allowed, input_columns=column)
    if source.limit is not None and len(rows) > source.limit:
        rows = rows.shuffle(seed=0).select(range(source.limit))
    return rows


def _take(stream: IterableDataset, source: Source, where: str) -> Dataset:
    """The first `limit` rows of a stream that pass `where`."""
    assert source.limit is not None
    taken, _ = take(enumerate(stream), source, where, source.limit)
    if not taken:
        raise no_rows_in(where, source)
    return table_of(taken, where)


def no_rows_in(where: str, source: Source) -> InputError:
    return InputError(f"{where}: the stream holds no rows (filter {source.where or 'none'}); give a data set that "
                      "is not empty")  # fmt: skip


def take(
    rows: Iterator[tuple[int, dict[str, Any]]], source: Source, where: str, count: int
) -> tuple[list[dict[str, Any]], int]:
    """The next `count` rows (fewer at the end) of a numbered stream that pass `where`, each with its number as `row`;
    and how many were read for them."""
    taken: list[dict[str, Any]] = []
    read = 0
    try:
        while len(taken) < count and (numbered := next(rows, None)) is not None:
            read += 1
            number, row = numbered
            for column in source.where:
                _check_filter(column, list(row), where)
            if all(row[column] in values for column, values in source.where.items()):
                taken.append({**row, "row": number})
    except InputError:
        raise
    except Exception as error:  # a stream is read here, not when it is opened
        raise _unreadable(where, error) from error
    return taken, read


def table_of(taken: list[dict[str, Any]], where: str) -> Dataset:
    from datasets import Dataset

    try:
        return Dataset.from_list(taken)
    except Exception as error:  # values of one column that are of two types
        raise _unreadable(where, error) from error


def open_stream(source: Source, kind: str, data: str | None) -> tuple[str, IterableDataset]:
    """A source's resolved path and its rows as a stream, none of them read or checked yet. Raises InputError."""
    where = resolve_path(source, data)
    if kind == "retrieval" and Path(where).is_dir():
        raise InputError(f"{where}: a retrieval folder cannot be streamed; drop 'streaming', or give rows of query "
                         "and positive")  # fmt: skip
    return where, open_table(where, source)


def describe_files(source: Source, data: str | None) -> list[list[Any]]:
    """Name, size, and a hash of the first and last 64 KiB of each file of a local source; nothing for a hub id.

    Not the time of change: a copy on another node is the same data.
    """
    described = []
    for file in _files(resolve_path(source, data), source.split) or []:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
        described.append([file.name, size, digest.hexdigest()[:16]])
    return described


def _check_filter(column: str, names: list[str], where: str) -> None:
    if column not in names:
        found = ", ".join(name for name in names if name != "row")
        raise InputError(f"{where}: no column '{column}' to filter by; it has {found}")


def _unreadable(where: str, error: Exception) -> InputError:
    cause = error.__cause__ or error
    reason = str(cause).strip().split("\n")[0] or type(cause).__name__
    return InputError(f"{where}: cannot be read as a data set ({reason[:200]}); mend the file or its path")


def open_table(where: str, source: Source) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # or every local file is announced to the hub: seconds offline
    files = _files(where, source.split)
    try:
        if files is None:
            return datasets.load_dataset(where, source.name, split=source.split, streaming=source.streaming)
        extra = {"sep": "\t"} if files[0].name.removesuffix(".gz").endswith(".tsv") else {}
        return datasets.load_dataset(
            _format(files[0]),
            data_files=[str(file) for file in files],
            split="train",
            streaming=source.streaming,
            **extra,
        )
    except InputError:
        raise
    except Exception as error:  # datasets raises many types for one cause: the rows cannot be read
        raise _unreadable(where, error) from error


def _format(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    for ending, form in _FORMATS.items():
        if name.endswith(ending):
            return form
    raise InputError(f"{file}: format not known; give JSONL(.gz), Parquet, CSV or TSV")


def _files(where: str, split: str) -> list[Path] | None:
    """The files of a local source, or None for a hub id."""
    path = Path(where).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(
            file
            for ending in _FORMATS
            for file in (*path.glob(f"{split}*{ending}"), *path.glob(f"{split}*{ending}.gz"))
        )
        if not files:
            present = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
            raise InputError(f"{path}: no data file for split '{split}'; the folder holds {present}")
    elif path.suffix or where.startswith((".", "/", "~")) or where.count("/") > 1:
        raise InputError(f"{where}: no such data file or folder; mend the source's path")
    else:
        return None
    for file in files:
        if _is_empty(file):
            raise InputError(f"{file}: the data set is empty; give a file with rows")
        if not os.access(file, os.R_OK):
            raise InputError(f"{file}: not readable; change its permissions")
    return files


def _is_empty(file: Path) -> bool:
    """Nothing inside, or nothing inside the gzip."""
    if file.suffix != ".gz":
        return file.stat().st_size == 0
    try:
        with gzip.open(file) as stream:
            return not stream.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: not a whole gzip file ({error}); copy it again") from None


def _retrieval_rows(folder: Path, split: str) -> Dataset:
    """(query, positive) rows from a BEIR folder: every relevant document of every query of the split."""
    from datasets import Dataset

    def table(*names: str) -> Path:
        for name in names:
            for candidate in (folder / name, folder / f"{name}.gz"):
                if candidate.is_file():
                    return candidate
        raise InputError(
            f"{folder / names[0]}: missing; a retrieval folder has corpus, queries and qrels for '{split}'"
        )

    def texts(path: Path) -> dict[str, str]:
        rows = open_table(str(path), Source(path=str(path)))
        if not {"_id", "text"} <= set(rows.column_names):
            raise InputError(f"{path}: needs the columns _id and text; found {', '.join(rows.column_names)}")
        _check_texts(rows["text"][:], range(len(rows)), "text", str(path))
        titles = rows["title"][:] if "title" in rows.column_names else [""] * len(rows)
        return {
            str(key): f"{title or ''} {text}".strip()
            for key, title, text in zip(rows["_id"][:], titles, rows["text"][:], strict=True)
        }

    corpus = texts(table("corpus.jsonl"))
    queries = texts(table(f"queries.{split}.jsonl", "queries.jsonl"))
    qrels_path = table(f"qrels.{split}.tsv", f"qrels/{split}.tsv")
    qrels = open_table(str(qrels_path), Source(path=str(qrels_path)))
    if not {"query-id", "corpus-id", "score"} <= set(qrels.column_names):
        raise InputError(f"{qrels_path}: needs the header query-id, corpus-id, score; found {qrels.column_names}")
    scores = _scores(qrels["score"][:], range(len(qrels)), "score", str(qrels_path))
    pairs: dict[str, list[str]] = {"query": [], "positive": []}
    for query, document, score in zip(qrels["query-id"][:], qrels["corpus-id"][:], scores, strict=True):
        if score > 0 and str(query) in queries and str(document) in corpus:
            pairs["query"].append(queries[str(query)])
            pairs["positive"].append(corpus[str(document)])
    return Dataset.from_dict(pairs)


def canonical(rows: Dataset, source: Source, kind: str, where: str) -> Dataset:
    """Rows (numbered in a column `row`) in the schema of `kind`, checked; those with an empty text are left out."""
    columns = {role: _column(rows, source, role, where) for role in TEXT_ROLES[kind]}
    target = TARGETS.get(kind)
    if target:
        columns[target] = _column(rows, source, target, where)
    table: dict[str, list[Any]] = {role: rows[column][:] for role, column in columns.items()}
    numbers = rows["row"][:]
    for role in TEXT_ROLES[kind]:
        _check_texts(table[role], numbers, columns[role], where)
    if kind == "triplets":
        table["negatives"] = _negatives(rows, source, numbers, where)
    if target == "score":
        table["score"] = _scores(table["score"], numbers, columns["score"], where)
    elif target == "label":
        for number, value in zip(numbers, table["label"], strict=True):
            if value is None:
                raise InputError(f"{where}: row {number}: '{columns['label']}' is missing; label it")
        table["label"] = [str(value) for value in table["label"]]
    table["row"] = numbers
    keep = [index for index in range(len(table["row"])) if all(table[role][index].strip() for role in TEXT_ROLES[kind])]
    if len(keep) < len(table["row"]):
        table = {name: [values[index] for index in keep] for name, values in table.items()}
    return typed(table)


def typed(table: dict[str, list[Any]]) -> Dataset:
    """Canonical columns as a data set whose types do not depend on the values: any two can be put together."""
    from datasets import Dataset, Features, Value

    kinds: dict[str, Any] = {"negatives": [Value("string")], "score": Value("float64"), "row": Value("int64")}
    features = {name: kinds.get(name, Value("string")) for name in table}
    return Dataset.from_dict(table, features=Features(features))


def _column(rows: Dataset, source: Source, role: str, where: str) -> str:
    names = [source.columns[role]] if role in source.columns else list(_ALSO_CALLED[role])
    for name in names:
        if name in rows.column_names:
            return name
    found = ", ".join(name for name in rows.column_names if name != "row")
    raise InputError(
        f"{where}: no column '{names[0]}'; found {found}; name the right one under columns: {{{role}: ...}}"
    )


def _check_texts(values: Iterable[Any], numbers: Iterable[int], column: str, where: str) -> None:
    for number, value in zip(numbers, values, strict=True):
        if not isinstance(value, str):
            raise InputError(f"{where}: row {number}: '{column}' is {value!r}, not a text; mend the row")


def _scores(values: list[Any], numbers: Iterable[int], column: str, where: str) -> list[float]:
    for number, value in zip(numbers, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: row {number}: '{column}' is {value!r}, not a number; give numeric scores")
        if not math.isfinite(value):
            raise InputError(f"{where}: row {number}: '{column}' is {value}; give finite scores")
    return [float(value) for value in values]


def _negatives(rows: Dataset, source: Source, numbers: Sequence[int], where: str) -> list[list[str]]:
    numbered = sorted(name for name in rows.column_names if name.startswith("negative_"))
    lists: list[list[str]] = []
    if numbered and "negatives" not in source.columns:
        column = "negative_*"
        given: list[Any] = [
            [value for value in values if value] for values in zip(*(rows[name][:] for name in numbered), strict=True)
        ]
    else:
        column = _column(rows, source, "negatives", where)
        given = rows[column][:]
    for number, values in zip(numbers, given, strict=True):
        if values is not None and not isinstance(values, str | list):
            raise InputError(f"{where}: row {number}: '{column}' is {values!r}, not a list of texts; mend the row")
        lists.append([values] if isinstance(values, str) else list(values or []))
        _check_texts(lists[-1], [number] * len(lists[-1]), column, where)
    return lists
