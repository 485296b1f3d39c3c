"""Every source format, and every way in which one can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalemerge.data.sources import load_rows, resolve_path
from scalemerge.errors import InputError
from scalemerge.recipe import Source

PAIRS = [{"query": f"question {i}", "positive": f"answer {i}", "topic": "ab"[i % 2]} for i in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it has read; a cache of its own keeps a test from reading another's rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def delimited(path: Path, rows: list[dict[str, Any]], delimiter: str) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


FORMATS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "rows.jsonl": jsonl,
    "rows.jsonl.gz": jsonl,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)) and path,
    "rows.parquet": parquet,
    "rows.csv": lambda path, rows: delimited(path, rows, ","),
    "rows.tsv": lambda path, rows: delimited(path, rows, "\t"),
}


def source(path: Path, **settings: Any) -> Source:
    return Source(path=str(path), **settings)


def refused(made: Source, kind: str, *parts: str, data: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_rows(made, kind, data=data)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# ---- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    rows = load_rows(source(FORMATS[name](tmp_path / name, PAIRS)), "pairs")
    assert rows.column_names == ["query", "positive", "row"]
    assert list(rows["query"]) == [row["query"] for row in PAIRS]
    assert list(rows["positive"]) == [row["positive"] for row in PAIRS]
    assert list(rows["row"]) == list(range(10))


@pytest.mark.parametrize("name", FORMATS)
def test_streaming_reads_the_same(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path / name, PAIRS)
    rows = load_rows(source(path, streaming=True, limit=4), "pairs")
    assert list(rows["query"]) == [row["query"] for row in PAIRS[:4]]
    assert list(rows["row"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", FORMATS)
def test_streaming_with_a_filter(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path / name, PAIRS)
    rows = load_rows(source(path, streaming=True, limit=3, where={"topic": ["b"]}), "pairs")
    assert list(rows["query"]) == ["question 1", "question 3", "question 5"]


def test_folder_and_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl.gz", PAIRS[:6])
    jsonl(tmp_path / "test.jsonl.gz", PAIRS[6:])
    assert len(load_rows(source(tmp_path), "pairs")) == 6
    assert list(load_rows(source(tmp_path, split="test"), "pairs")["query"]) == [
        "question 6",
        "question 7",
        "question 8",
        "question 9",
    ]
    refused(source(tmp_path, split="dev"), "pairs", str(tmp_path), "split 'dev'", "test.jsonl.gz, train.jsonl.gz")


def test_folder_of_shards_in_order(tmp_path: Path) -> None:
    for shard in range(3):
        jsonl(tmp_path / f"train-{shard}.jsonl", PAIRS[shard * 3 : shard * 3 + 3])
    rows = load_rows(source(tmp_path), "pairs")
    assert list(rows["query"]) == [row["query"] for row in PAIRS[:9]]
    assert list(rows["row"]) == list(range(9))


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", PAIRS)
    assert len(load_rows(source(path), "pairs")) == 10
    jsonl(path, PAIRS[:3])
    assert len(load_rows(source(path), "pairs")) == 3


@pytest.mark.parametrize("layout", ["files", "folder"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_retrieval_folder(layout: str, ending: str, tmp_path: Path) -> None:
    """Both BEIR layouts; one row for every relevant document, title and text together; other judgements left out."""
    jsonl(
        tmp_path / f"corpus.jsonl{ending}",
        [
            {"_id": "d0", "title": "Title", "text": "text 0"},
            {"_id": "d1", "title": "", "text": "text 1"},
            {"_id": "d2", "title": "", "text": "text 2"},
        ],
    )
    queries = f"queries.test.jsonl{ending}" if layout == "files" else f"queries.jsonl{ending}"
    jsonl(tmp_path / queries, [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)])
    qrels = tmp_path / ("qrels.test.tsv" if layout == "files" else "qrels/test.tsv")
    qrels.parent.mkdir(exist_ok=True)
    judged = ["q0\td0\t1", "q0\td1\t2", "q1\td2\t0", "q2\td2\t1", "q2\td9\t1", "q9\td0\t1"]
    qrels.write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    rows = load_rows(source(tmp_path, split="test"), "retrieval")
    assert list(zip(rows["query"], rows["positive"])) == [
        ("query 0", "Title text 0"),
        ("query 0", "text 1"),
        ("query 2", "text 2"),
    ]


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    jsonl(tmp_path / "corpus.jsonl", [{"_id": "d0", "title": "", "text": "text"}])
    jsonl(tmp_path / "queries.jsonl", [{"_id": "q0", "text": "query"}])
    (tmp_path / "qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("corpus.jsonl", None, "missing"),
        ("queries.jsonl", None, "missing"),
        ("qrels.test.tsv", None, "missing"),
        ("corpus.jsonl", '{"id": "d0", "text": "x"}\n', "needs the columns _id and text"),
        ("corpus.jsonl", '{"_id": "d0", "text": null}\n{"_id": "d1", "text": "a"}\n', "'text' is None, not a text"),
        ("queries.jsonl", '{"_id": "q0", "text": 3}\n', "'text' is 3, not a text"),
        ("qrels.test.tsv", "query\tdocument\tscore\nq0\td0\t1\n", "needs the header query-id, corpus-id, score"),
        ("qrels.test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\thigh\n", "'score' is 'high', not a number"),
        ("qrels.test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t\n", "'score' is None"),
        ("qrels.test.tsv", "query-id\tcorpus-id\tscore\nq7\td0\t1\n", "no rows"),
    ],
)
def test_bad_retrieval_folder(beir: Path, name: str, content: str | None, expected: str) -> None:
    (beir / name).unlink() if content is None else (beir / name).write_text(content)
    named = str(beir) if expected == "no rows" else name.split(".")[0]
    refused(source(beir, split="test"), "retrieval", named, expected)


def test_missing_titles_are_empty(beir: Path) -> None:
    jsonl(
        beir / "corpus.jsonl", [{"_id": "d0", "title": None, "text": "text"}, {"_id": "d1", "title": "T", "text": "u"}]
    )
    assert list(load_rows(source(beir, split="test"), "retrieval")["positive"]) == ["text"]


# ---- columns, filters, limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("pairs", {"anchor": "a", "document": "b"}, {"query": "a", "positive": "b"}),
        ("pairs", {"question": "a", "answer": "b"}, {"query": "a", "positive": "b"}),
        (
            "triplets",
            {"anchor": "a", "positive": "b", "negative": "c"},
            {"query": "a", "positive": "b", "negatives": ["c"]},
        ),
        (
            "triplets",
            {"query": "a", "pos": "b", "neg": ["c", "d"]},
            {"query": "a", "positive": "b", "negatives": ["c", "d"]},
        ),
        (
            "triplets",
            {"query": "a", "positive": "b", "negative_1": "c", "negative_2": ""},
            {"query": "a", "positive": "b", "negatives": ["c"]},
        ),
        (
            "scored_pairs",
            {"text1": "a", "text2": "b", "similarity_score": 3},
            {"sentence1": "a", "sentence2": "b", "score": 3.0},
        ),
        ("labelled_texts", {"sentence": "a", "labels": 7}, {"text": "a", "label": "7"}),
        ("labelled_texts", {"text": "a", "label": True}, {"text": "a", "label": "True"}),
    ],
)
def test_names_of_columns(kind: str, row: dict, expected: dict, tmp_path: Path) -> None:
    rows = load_rows(source(jsonl(tmp_path / "rows.jsonl", [row])), kind)
    assert {name: rows[0][name] for name in expected} == expected


def test_columns_are_mapped(tmp_path: Path) -> None:
    """A mapping wins over a column that happens to have the usual name."""
    path = jsonl(tmp_path / "rows.jsonl", [{"query": "wrong", "titel": "right", "positive": "p"}])
    rows = load_rows(source(path, columns={"query": "titel"}), "pairs")
    assert rows["query"][0] == "right"
    refused(
        source(path, columns={"query": "title"}), "pairs", str(path), "no column 'title'", "titel", "columns: {query:"
    )


def test_any_number_of_negatives(tmp_path: Path) -> None:
    lists = [["a"], [], ["b", "c", "d"], None]
    path = jsonl(tmp_path / "rows.jsonl", [{"query": "q", "positive": "p", "negatives": given} for given in lists])
    assert list(load_rows(source(path), "triplets")["negatives"]) == [["a"], [], ["b", "c", "d"], []]


def test_filter(tmp_path: Path) -> None:
    """Row numbers are those of the file, so that an id names the same row whatever the filter is."""
    path = jsonl(tmp_path / "rows.jsonl", PAIRS)
    rows = load_rows(source(path, where={"topic": ["b"]}), "pairs")
    assert list(rows["row"]) == [1, 3, 5, 7, 9]
    assert list(rows["query"]) == [f"question {i}" for i in (1, 3, 5, 7, 9)]
    both = load_rows(source(path, where={"topic": ["b"], "query": ["question 3", "question 4"]}), "pairs")
    assert list(both["row"]) == [3]
    refused(source(path, where={"tpoic": ["b"]}), "pairs", "no column 'tpoic' to filter by", "topic")
    refused(source(path, where={"topic": ["z"]}), "pairs", str(path), "no rows", "{'topic': ['z']}")


def test_limit_is_a_fixed_sample(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", PAIRS)
    first, second = (list(load_rows(source(path, limit=4), "pairs")["row"]) for _ in range(2))
    assert first == second and len(set(first)) == 4
    assert first != [0, 1, 2, 3], "a sample, not the head of a sorted file"
    assert len(load_rows(source(path, limit=40), "pairs")) == 10


def test_blank_texts_are_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"query": " ", "positive": "p"}, {"query": "q", "positive": "p"}])
    assert list(load_rows(source(path), "pairs")["row"]) == [1]


def test_data_placeholder(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "train.jsonl", PAIRS)
    made = Source(path="{data}/set")
    assert len(load_rows(made, "pairs", data=str(tmp_path))) == 10
    assert resolve_path(made, "/x") == "/x/set"
    refused(made, "pairs", "{data}/set", "--data DIR", "SCALEMERGE_DATA")


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(source(tmp_path / "none.jsonl"), "pairs", str(tmp_path / "none.jsonl"), "no such data file")
    refused(source(tmp_path / "none"), "pairs", str(tmp_path / "none"), "no such data file or folder")


def test_empty_folder(tmp_path: Path) -> None:
    refused(source(tmp_path), "pairs", str(tmp_path), "the folder holds nothing")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("newlines.jsonl", b"\n\n"),
        ("rows.json", b"[]"),
        ("broken.jsonl", b'{"query": "a", "positive": "b"}\n{"query": "a", "pos\n'),
        ("broken.jsonl", b"not json at all\n"),
        ("binary.jsonl", bytes(range(256))),
        ("latin.jsonl", '{"query": "é", "positive": "b"}\n'.encode("latin-1")),
        ("empty.jsonl.gz", gzip.compress(b"")),
        ("truncated.jsonl.gz", gzip.compress(b'{"query": "a", "positive": "b"}\n' * 1000)[:-20]),
        ("plain.jsonl.gz", b'{"query": "a", "positive": "b"}\n'),
        ("rows.parquet", b"PAR1 not really"),
        ("header.csv", b"query,positive\n"),
        ("rows.txt", b"a\tb\n"),
        ("rows", b"a\tb\n"),
    ],
)
def test_bad_files_name_the_file(name: str, content: bytes, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    settings = {"streaming": True, "limit": 5} if streaming else {}
    refused(source(tmp_path / name, **settings), "pairs", name)


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("pairs", [{"question1": "a", "positive": "b"}], "no column 'query'; found question1, positive"),
        (
            "pairs",
            [{"query": "a", "positive": None}, {"query": "a", "positive": "b"}],
            "row 0: 'positive' is None, not a text",
        ),
        ("pairs", [{"query": 3, "positive": "b"}], "row 0: 'query' is 3, not a text"),
        ("triplets", [{"query": "a", "positive": "b"}], "no column 'negatives'"),
        (
            "triplets",
            [{"query": "a", "positive": "b", "negatives": [None, "c"]}],
            "row 0: 'negatives' is None, not a text",
        ),
        ("triplets", [{"query": "a", "positive": "b", "negatives": 5}], "row 0: 'negatives' is 5, not a list of texts"),
        ("scored_pairs", [{"sentence1": "a", "sentence2": "b"}], "no column 'score'"),
        (
            "scored_pairs",
            [{"sentence1": "a", "sentence2": "b", "score": "high"}],
            "row 0: 'score' is 'high', not a number",
        ),
        (
            "scored_pairs",
            [{"sentence1": "a", "sentence2": "b", "score": "4.5"}],
            "row 0: 'score' is '4.5', not a number",
        ),
        ("scored_pairs", [{"sentence1": "a", "sentence2": "b", "score": True}], "'score' is True, not a number"),
        (
            "scored_pairs",
            [{"sentence1": "a", "sentence2": "b", "score": 1.5}, {"sentence1": "a", "sentence2": "b", "score": None}],
            "row 1: 'score' is None, not a number",
        ),
        ("labelled_texts", [{"text": "a", "label": "x"}, {"text": "b", "label": None}], "row 1: 'label' is missing"),
        ("labelled_texts", [{"txt": "a", "label": "x"}], "no column 'text'; found txt, label"),
    ],
)
def test_bad_rows_name_file_row_and_field(kind: str, rows: list[dict], expected: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", rows)
    refused(source(path), kind, str(path), expected)


def test_the_row_named_is_that_of_the_file(tmp_path: Path) -> None:
    """Also behind a filter."""
    rows = [{"query": "a", "positive": "b", "keep": n > 3} for n in range(6)]
    rows[5]["positive"] = None
    path = jsonl(tmp_path / "rows.jsonl", rows)
    refused(source(path, where={"keep": [True]}), "pairs", "row 5: 'positive' is None")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_scores_that_are_not_finite(value: float, name: str, tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 1.0}, {"sentence1": "a", "sentence2": "b", "score": value}]
    path = FORMATS[name](tmp_path / name, rows)
    refused(source(path), "scored_pairs", str(path), "row 1: 'score' is")


def test_nan_in_json(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": NaN}\n')
    refused(source(tmp_path / "rows.jsonl"), "scored_pairs", "rows.jsonl")


def test_shared_data_is_read(shared_data: Path) -> None:
    """One set of each kind, through the placeholder."""
    for path, kind, split in [
        ("train-retrieval-squad", "pairs", "train"),
        ("train-nli", "triplets", "triplets"),
        ("train-sts", "scored_pairs", "train"),
        ("tweet-emotion", "labelled_texts", "train"),
        ("xquad-en", "retrieval", "test"),
    ]:
        rows = load_rows(Source(path=f"{{data}}/{path}", split=split, limit=50), kind, data=str(shared_data))
        assert len(rows) >= 50
