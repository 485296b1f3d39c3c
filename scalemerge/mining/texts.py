"""The texts of a mining run: rows, the corpus that negatives come from, and who must not be whose negative.

Texts equal but for case and white space are one text here (scalemerge.data.tasks.fingerprint), embedded once as its
first spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scalemerge.data.sources import load_rows, open_table, resolve_path
from scalemerge.data.tasks import fingerprint
from scalemerge.errors import InputError
from scalemerge.recipe import Source

KINDS = ("pairs", "triplets", "retrieval")
_TEXT_COLUMNS = ("text", "document", "passage", "positive")


@dataclass
class MiningTexts:
    """Different texts by number.

    documents: the corpus, its first `searched`, then the positives that the corpus lacks. rows: (query, positive) of
    each row. positives: of each query, all its known positives' documents. itself: of each query, the document with its
    own text, or -1. repeated: texts of the corpus that were there before.
    """

    queries: list[str]
    documents: list[str]
    searched: int
    rows: list[tuple[int, int]]
    positives: list[set[int]]
    itself: list[int]
    repeated: int


def number_texts(rows: Sequence[tuple[str, str]], corpus: Sequence[str]) -> MiningTexts:
    """rows: (query, positive). Blank texts of the corpus are left out."""
    documents: dict[int, int] = {}
    texts: list[str] = []

    def document(text: str) -> int:
        number = documents.setdefault(fingerprint(text), len(texts))
        if number == len(texts):
            texts.append(text)
        return number

    count = 0
    for text in corpus:
        if text.strip():
            document(text)
            count += 1
    searched = len(texts)
    queries: dict[int, int] = {}
    spelled: list[str] = []
    numbered, positives, itself = [], [], []
    for query, positive in rows:
        mark = fingerprint(query)
        if mark not in queries:
            queries[mark] = len(spelled)
            spelled.append(query)
            positives.append(set[int]())
            itself.append(documents.get(mark, -1))
        numbered.append((queries[mark], document(positive)))
        positives[queries[mark]].add(numbered[-1][1])
    return MiningTexts(spelled, texts, searched, numbered, positives, itself, count - searched)


def read_rows(
    source: Source, kind: str, corpus: str | None, data: str | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """(query, positive) of each row, and the corpus.

    Without `corpus`, negatives come from the source itself: the positives of all rows, the negatives that rows of kind
    triplets have, and the whole corpus of a retrieval folder. Raises InputError.
    """
    table = load_rows(source, kind, data=data)
    rows = list(zip(list(table["query"]), list(table["positive"]), strict=True))
    if corpus is not None:
        return rows, read_corpus(corpus, data)
    texts = [positive for _, positive in rows]
    if kind == "triplets":
        texts += [text for negatives in table["negatives"] for text in negatives]
    where = resolve_path(source, data)
    if kind == "retrieval" and Path(where).is_dir():
        texts = read_corpus(where, data)
    return rows, texts


def read_corpus(path: str, data: str | None = None) -> list[str]:
    """The texts of a corpus: column `text` (or document, passage, positive), a `title` put before it.

    path: a JSONL(.gz), Parquet or CSV file, or a folder with corpus.jsonl(.gz). Raises InputError.
    """
    source = Source(path=path)
    where = Path(resolve_path(source, data))
    if where.is_dir():
        found = [where / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (where / name).is_file()]
        where = found[0] if found else where
    table = open_table(str(where), source)
    column = next((name for name in _TEXT_COLUMNS if name in table.column_names), None)
    if column is None:
        raise InputError(
            f"{where}: no column 'text'; found {', '.join(table.column_names)}; rename the column of texts"
        )
    texts, titles = list(table[column]), list(table["title"]) if "title" in table.column_names else None
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{where}: row {number}: '{column}' is {text!r}, not a text; mend the row")
    if titles is not None:
        texts = [f"{title or ''} {text}".strip() for title, text in zip(titles, texts, strict=True)]
    if not any(text.strip() for text in texts):
        raise InputError(f"{where}: no texts; give a corpus that is not empty")
    return texts
