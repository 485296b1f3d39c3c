"""Turn documented functions into the rows of the `docs` suite's files.

Everything here is a pure function of the entries: rows are put in the order of a hash of their content, so that a file
mixes all packages, sampling needs no generator, and one function more or less moves no other row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from scalemerge.data.docs_mining import Documented
from scalemerge.data.docs_paraphrases import distinct_sentences, hard_negatives, same_name_pairs

TOPICS = {
    "scipy.stats": "statistics",
    "scipy.signal": "signal processing",
    "scipy.optimize": "optimization",
    "scipy.sparse": "sparse matrices",
    "scipy.interpolate": "interpolation",
    "scipy.linalg": "linear algebra",
    "scipy.spatial": "geometry",
    "scipy.special": "special functions",
    "scipy.integrate": "integration",
    "scipy.ndimage": "images",
    "scipy.io": "scientific files",
    "pandas.core.indexes": "indexes",
    "pandas.core.groupby": "grouping",
    "pandas.core.window": "windows",
    "pandas.core.strings": "strings",
    "pandas.core.dtypes": "data types",
    "pandas.io": "table files",
    "pandas.plotting": "plots",
    "pandas.core.internals": "storage blocks",
    "polars.io": "data frame files",
}
"""Module prefix -> label of docs-topics; docs-modules uses the finer modules themselves."""

MIRRORED_MODULES = frozenset(
    [f"pandas.core.{name}" for name in ("frame", "series", "generic", "arrays")]
    + [f"polars.{name}" for name in ("dataframe", "lazyframe", "series", "expr")]
    + [f"narwhals.{name}" for name in ("dataframe", "series", "expr", "stable")]
)
"""Modules that offer the same methods on other classes: nobody could tell their summaries apart."""

Rows = dict[str, list[dict[str, Any]]]
_Row = TypeVar("_Row")
_NOT_A_QUERY = re.compile(r"(?i)(this is )?(an? )?(see|alias|wrapper|deprecated|todo|fixme|internal|same as|copied)\b")


@dataclass(frozen=True)
class Limits:
    """Sizes of the suite. Lengths are in characters; `min_rows` is the fewest rows a file may have."""

    queries: int = 500
    corpus: int = 3000
    body: int = 600
    code: int = 800
    rows_a_label: int = 60
    min_rows_a_label: int = 30
    min_rows: int = 100


def is_useful_summary(summary: str) -> bool:
    """Whether a summary can serve as a query: a phrase of words, neither a stub, a cross reference nor code."""
    letters = sum(character.isalpha() or character == " " for character in summary)
    return (
        20 <= len(summary) <= 200
        and len(summary.split()) >= 4
        and letters >= 0.75 * len(summary)
        and summary.isascii()
        and not _NOT_A_QUERY.match(summary)
    )


def assemble(
    train: Sequence[Documented], validation: Sequence[Documented], test: Sequence[Documented], limits: Limits
) -> Rows:
    """All files of the suite as rows, by file name. Pure: the same entries give the same rows in the same order."""
    tested = _texts(test, limits)
    validation = [entry for entry in validation if tested.isdisjoint(_texts([entry], limits))]
    held_out = tested | _texts(validation, limits)
    train = [entry for entry in train if held_out.isdisjoint(_texts([entry], limits))]
    public = [entry for entry in test if entry.is_public]
    sentences = distinct_sentences(public)
    triplets = hard_negatives(same_name_pairs(sentences), sentences)
    topics = _topic_rows(public, limits)
    return {
        "train-docs-search/train.jsonl.gz": _training_pairs(train, _body, limits),
        "train-code-search/train.jsonl.gz": _training_pairs(train, _code, limits),
        "train-docs-paraphrase/train.jsonl.gz": _shuffled(
            [{"query": a.text, "positive": b.text} for a, b in same_name_pairs(distinct_sentences(train))]
        ),
        **_retrieval_files("docs-search", "test", public, _body, limits),
        **_retrieval_files("code-search", "test", public, _code, limits),
        **_retrieval_files("docs-search-validation", "validation", validation, _body, limits),
        **_retrieval_files("code-search-validation", "validation", validation, _code, limits),
        "docs-paraphrase/test.jsonl.gz": _shuffled(
            {"sentence1": left.text, "sentence2": other.text, "label": label}
            for left, right, negative in triplets
            for label, other in ((1, right), (0, negative))
        ),
        "docs-topics/train.jsonl.gz": topics[0::2],
        "docs-topics/test.jsonl.gz": topics[1::2],
        "docs-modules/test.jsonl.gz": _cluster_rows(public, limits),
    }


Target = Callable[[Documented, Limits], str]


def _body(entry: Documented, limits: Limits) -> str:
    """What docs-search looks for; empty where it is too short or gives the summary away word for word."""
    body = _cut(entry.body, limits.body)
    if len(body) < 60 or len(body.split()) < 10 or _normalized(entry.summary) in _normalized(body):
        return ""
    return body


def _code(entry: Documented, limits: Limits) -> str:
    """What code-search looks for; empty where there are fewer than two lines below the signature."""
    code = _cut(entry.code, limits.code)
    if code.count("\n") < 2 or len(code) < 80 or _normalized(entry.summary) in _normalized(code):
        return ""
    return code


def _cut(text: str, length: int) -> str:
    """The text's beginning up to a word's end."""
    return text if len(text) <= length else text[: length + 1].rsplit(None, 1)[0]


def _normalized(text: str) -> str:
    """What two texts are compared by: letters and digits, so that markup and line breaks make no difference."""
    return re.sub(r"[\W_]+", " ", text).strip().lower()


def _texts(entries: Iterable[Documented], limits: Limits) -> set[str]:
    """Every text that entries can contribute to a file, normalized."""
    texts = (text for e in entries for text in (e.summary, _body(e, limits), _code(e, limits)))
    return {_normalized(text) for text in texts if text}


def digest(row: object) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _shuffled(rows: Iterable[_Row]) -> list[_Row]:
    """Rows in an order that mixes packages and does not change for one row because another came or went."""
    return sorted(rows, key=digest)


def _distinct(rows: Iterable[_Row], by: Callable[[_Row], Hashable] = digest) -> list[_Row]:
    """The first row of each value of `by`."""
    return list({by(row): row for row in reversed(list(rows))}.values())[::-1]


def _training_pairs(entries: Sequence[Documented], target: Target, limits: Limits) -> list[dict[str, Any]]:
    """Query and positive; each text once, since two equal ones in a batch would be each other's negatives."""
    rows = [{"query": entry.summary, "positive": target(entry, limits)} for entry in entries]
    rows = _distinct((row for row in rows if row["positive"]), by=lambda row: _normalized(row["query"]))
    return _shuffled(_distinct(rows, by=lambda row: _normalized(row["positive"])))


def _retrieval_files(name: str, split: str, entries: Sequence[Documented], target: Target, limits: Limits) -> Rows:
    """Corpus, queries and judgements. Equal texts are one document or query; a query has all documents that share it.

    Summaries that more than five documents share ("Compute the sum of the values") are no queries: finding one of them
    first is no merit.
    """
    documents: dict[str, str] = {}
    relevant: dict[str, tuple[str, set[str]]] = {}
    for entry in entries:
        text = target(entry, limits)
        if text:
            document = documents.setdefault(_normalized(text), text)
            relevant.setdefault(_normalized(entry.summary), (entry.summary, set()))[1].add(document)
    answerable = [(summary, texts) for summary, texts in relevant.values() if len(texts) <= 5]
    chosen = sorted(answerable, key=lambda item: digest(item[0]))[: limits.queries]
    needed = {text for _, texts in chosen for text in texts}
    rest = _shuffled(text for text in documents.values() if text not in needed)
    corpus = _shuffled([*needed, *rest[: max(limits.corpus - len(needed), 0)]])
    ids = {text: f"d{position}" for position, text in enumerate(corpus)}
    queries = [{"_id": f"q{position}", "text": summary} for position, (summary, _) in enumerate(chosen)]
    return {
        f"{name}/corpus.jsonl.gz": [{"_id": ids[text], "title": "", "text": text} for text in corpus],
        f"{name}/queries.{split}.jsonl.gz": queries,
        f"{name}/qrels.{split}.tsv": [
            {"query-id": query["_id"], "corpus-id": document, "score": 1}
            for query, (_, texts) in zip(queries, chosen, strict=True)
            for document in sorted(ids[text] for text in texts)
        ],
    }


def _labelled(entries: Iterable[Documented], label: Callable[[str], str], text: Callable[[Documented], str]) -> Rows:
    """Rows by label; texts that occur under two labels are dropped, as are equal ones."""
    labels: dict[str, set[str]] = defaultdict(set)
    rows: list[dict[str, Any]] = []
    for entry in entries:
        name = label(f"{entry.package}.{entry.module}")
        if name:
            rows.append({"text": text(entry), "label": name})
            labels[_normalized(rows[-1]["text"])].add(name)
    unambiguous = (row for row in rows if len(labels[_normalized(row["text"])]) == 1)
    by_label: Rows = defaultdict(list)
    for row in _shuffled(_distinct(unambiguous, by=lambda row: _normalized(row["text"]))):
        by_label[row["label"]].append(row)
    return by_label


def _without_module_names(text: str) -> str:
    """Dotted names reduced to their last part: `scipy.stats.norm` would say the label."""
    return re.sub(r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\.([A-Za-z_]\w*)", r"\1", text)


def _topic_rows(entries: Iterable[Documented], limits: Limits) -> list[dict[str, Any]]:
    """docs-topics: an even number of rows a label, ordered so that every second one makes a stratified half."""

    def label(module: str) -> str:
        return next((name for prefix, name in TOPICS.items() if f"{module}.".startswith(f"{prefix}.")), "")

    by_label = _labelled(entries, label, lambda e: _without_module_names(_cut(f"{e.summary}. {e.body}".strip(), 200)))
    return [
        row
        for name in sorted(by_label)
        if len(by_label[name]) >= limits.min_rows_a_label
        for row in by_label[name][: 2 * (min(len(by_label[name]), 2 * limits.rows_a_label) // 2)]
    ]


def _cluster_rows(entries: Iterable[Documented], limits: Limits) -> list[dict[str, Any]]:
    """docs-modules: the summary alone; labels are modules of the second level (third in pandas.core and pandas.io)."""

    def label(module: str) -> str:
        parts = module.split(".")
        depth = 3 if parts[:2] in (["pandas", "core"], ["pandas", "io"]) else 2
        name = ".".join(parts[:depth])
        known = len(parts) >= depth and not parts[depth - 1].startswith("_") and name not in MIRRORED_MODULES
        return name if known else ""

    by_label = _labelled(entries, label, lambda entry: _without_module_names(entry.summary))
    frequent = [rows for rows in by_label.values() if len(rows) >= limits.min_rows_a_label]
    return _shuffled(row for rows in frequent for row in rows[: 2 * limits.rows_a_label])
