"""Reads one task's files into plain rows: validates every field, applies the caps, and fingerprints the definition.

Everything mteb would only trip over after encoding (a NaN score, a judgement of an unknown document, one label only)
is found here and raised as InputError.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import EvaluationTask
from scalemerge.evaluation.row_files import (
    Fields,
    Row,
    existing_file,
    is_binary,
    is_key,
    is_label,
    is_number,
    is_text,
    is_texts,
    open_file,
    read_judgements,
    read_rows,
    unique_ids,
)

# Part of every fingerprint: raise it when the meaning of a task changes (caps, protocol, metric), so that scores made
# by an older version are not taken for current ones.
DEFINITION_VERSION = 1


@dataclass
class TaskData:
    """The rows of one task after the caps. `train` is for classification, the last four for retrieval and reranking."""

    rows: list[Row] = field(default_factory=list)
    train: list[Row] = field(default_factory=list)
    corpus: list[Row] = field(default_factory=list)
    queries: list[Row] = field(default_factory=list)
    relevant: dict[str, dict[str, int]] = field(default_factory=dict)
    ranked: dict[str, list[str]] | None = None


def task_files(task: EvaluationTask) -> list[Path]:
    """The files a task reads. Raises InputError where one is missing."""
    if task.folder is None:
        return []
    if task.type == "retrieval":
        return [
            existing_file(task.folder, "corpus"),
            existing_file(task.folder, f"queries.{task.split}"),
            existing_file(task.folder, f"qrels.{task.split}", (".tsv",)),
        ]
    files = [existing_file(task.folder, task.split)]
    if task.train_split is not None:
        files.append(existing_file(task.folder, task.train_split))
    return files


def fingerprint(task: EvaluationTask) -> str:
    """40 hex digits of the files' content and of the task's settings: the mteb dataset revision of a local task.

    The content is hashed unpacked, so a file that was only packed again keeps its scores.
    """
    digest = hashlib.sha256(json.dumps([DEFINITION_VERSION, task.settings()], sort_keys=True).encode())
    for path in task_files(task):
        digest.update(path.name.encode() + b"\0")
        try:
            with open_file(path) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not readable ({error}); restore the file") from None
    return digest.hexdigest()[:40]


def read_task(task: EvaluationTask) -> TaskData:
    """Read, validate and cap a local task. Raises InputError that names file, line, field and remedy."""
    files = task_files(task)
    readers: dict[str, Callable[[EvaluationTask, list[Path]], TaskData]] = {
        "sts": _read_sts,
        "pair_classification": _read_pairs,
        "classification": _read_labelled,
        "clustering": _read_labelled,
        "reranking": _read_reranking,
        "retrieval": _read_retrieval,
    }
    return readers[task.type](task, files)


# ---- one reader a type -----------------------------------------------------------------------------------------


def _read_sts(task: EvaluationTask, files: list[Path]) -> TaskData:
    fields: Fields = {"sentence1": is_text, "sentence2": is_text, "score": is_number}
    rows = _cap(read_rows(files[0], fields), task.options.max_rows, task.options.seed)
    if len({row["score"] for row in rows}) < 2:
        raise InputError(f"{files[0]}: field 'score' has one value only, no rank correlation exists; use more rows")
    return TaskData(rows=rows)


def _read_pairs(task: EvaluationTask, files: list[Path]) -> TaskData:
    fields: Fields = {"sentence1": is_text, "sentence2": is_text, "label": is_binary}
    rows = _cap(read_rows(files[0], fields), task.options.max_rows, task.options.seed, by="label")
    _two_labels(files[0], rows)
    return TaskData(rows=rows)


def _read_labelled(task: EvaluationTask, files: list[Path]) -> TaskData:
    fields: Fields = {"text": is_text, "label": is_label}
    options = task.options
    data = TaskData(rows=_cap(read_rows(files[0], fields), options.max_rows, options.seed, by="label"))
    _two_labels(files[0], data.rows)
    if task.train_split is not None:
        data.train = _cap(read_rows(files[1], fields), options.max_train_rows, options.seed, by="label")
        _two_labels(files[1], data.train)
        unknown = {row["label"] for row in data.rows} - {row["label"] for row in data.train}
        if unknown:
            raise InputError(f"{files[1]}: label '{min(unknown)}' of {files[0].name} is in no row of this split; "
                             "add training rows of that label or raise max_train_rows")  # fmt: skip
    # Numbers in the order of the names: binary metrics and cluster labels must not depend on the labels' spelling.
    names = sorted({row["label"] for row in data.rows + data.train})
    numbers = {name: number for number, name in enumerate(names)}
    for rows in (data.rows, data.train):
        for row in rows:
            row["label"] = numbers[row["label"]]
    return data


def _read_reranking(task: EvaluationTask, files: list[Path]) -> TaskData:
    fields: Fields = {"query": is_text, "positive": is_texts, "negative": is_texts}
    rows = _cap(read_rows(files[0], fields), task.options.max_queries, task.options.seed)
    data = TaskData(ranked={})
    assert data.ranked is not None
    for number, row in enumerate(rows):
        query = f"query{number}"
        data.queries.append({"id": query, "text": row["query"]})
        data.relevant[query], data.ranked[query] = {}, []
        # mteb's own document names; its ranking breaks ties between equal scores by them.
        groups = (("apositive", 1, row["positive"]), ("negative", 0, row["negative"]))
        for kind, relevance, texts in groups:
            for position, text in enumerate(texts):
                document = f"{kind}_{query}_{position:05d}"
                data.corpus.append({"id": document, "title": "", "text": text})
                data.relevant[query][document] = relevance
                data.ranked[query].append(document)
    return data


def _read_retrieval(task: EvaluationTask, files: list[Path]) -> TaskData:
    corpus_file, query_file, qrels_file = files
    corpus = read_rows(corpus_file, {"_id": is_key, "text": is_text}, {"title": is_text})
    queries = read_rows(query_file, {"_id": is_key, "text": is_text})
    documents, asked = unique_ids(corpus_file, corpus), unique_ids(query_file, queries)
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    for line, (query, document, score) in read_judgements(qrels_file):
        if query not in asked:
            raise InputError(f"{qrels_file}: line {line}: query-id '{query}' is not in {query_file.name}; "
                             "add the query or drop the line")  # fmt: skip
        if document not in documents:
            raise InputError(f"{qrels_file}: line {line}: corpus-id '{document}' is not in {corpus_file.name}; "
                             "add the document or drop the line")  # fmt: skip
        if score > 0:
            relevant[query][document] = score
    queries = [row for row in queries if row["_id"] in relevant]
    if not queries:
        raise InputError(f"{qrels_file}: no query has a relevant document (score above 0); add judgements")
    options = task.options
    queries = _cap(queries, options.max_queries, options.seed)
    relevant = {row["_id"]: relevant[row["_id"]] for row in queries}
    needed = {document for judged in relevant.values() for document in judged}
    if options.max_corpus is not None:
        others = [row for row in corpus if row["_id"] not in needed]
        kept = _cap(others, max(0, options.max_corpus - len(needed)), options.seed)
        needed |= {row["_id"] for row in kept}
        corpus = [row for row in corpus if row["_id"] in needed]
    return TaskData(
        corpus=[{"id": row["_id"], "title": row["title"] or "", "text": row["text"]} for row in corpus],
        queries=[{"id": row["_id"], "text": row["text"]} for row in queries],
        relevant=dict(relevant),
    )


def _two_labels(path: Path, rows: list[Row]) -> None:
    if len({row["label"] for row in rows}) < 2:
        raise InputError(f"{path}: field 'label' has one value only; give rows of at least two labels")


# ---- caps ------------------------------------------------------------------------------------------------------


def _cap(rows: list[Row], limit: int | None, seed: int, by: str | None = None) -> list[Row]:
    """At most `limit` rows in file order: drawn with `seed`, in proportion to field `by` (largest remainders)."""
    if limit is None or limit >= len(rows):
        return rows
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row[by] if by else None].append(index)
    names = sorted(groups, key=str)
    shares = {name: limit * len(groups[name]) / len(rows) for name in names}
    counts = {name: int(shares[name]) for name in names}
    for name in sorted(names, key=lambda name: counts[name] - shares[name])[: limit - sum(counts.values())]:
        counts[name] += 1
    drawn = random.Random(seed)
    kept = sorted(index for name in names for index in drawn.sample(groups[name], counts[name]))
    return [rows[index] for index in kept]
