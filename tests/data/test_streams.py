"""Streaming sources: positions, what is held out, keys, what a stream cannot do."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from scalemerge.data import streams as streams_module
from scalemerge.data.plan import BatchPlan
from scalemerge.data.probe import TaskData, load_tasks, manifest
from scalemerge.data.sources import load_rows
from scalemerge.data.streams import RowStream, StreamedRows
from scalemerge.data.tasks import TaskRows
from scalemerge.errors import InputError
from scalemerge.recipe import Recipe, Source
from scalemerge.training.job import expert_job, joint_job


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pairs(count: int, prefix: str = "q", copies: int = 1) -> list[dict[str, str]]:
    """Rows of so many queries; each occurs `copies` times, the copies far apart and in other cases."""
    made = []
    for copy in range(copies):
        made += [{"query": (prefix if copy % 2 else prefix.upper()) + str(n), "positive": f"p{copy}-{n}"}
                 for n in range(count)]  # fmt: skip
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def streamed(path: str, **settings: Any) -> dict[str, Any]:
    return {"path": path, "streaming": True, "window": 20} | settings


def recipe(tasks: dict[str, Any], **settings: Any) -> Recipe:
    return Recipe(
        name="x",
        base={"path": "b"},
        tasks=tasks,
        probe={"rows_per_task": 3, "validation_rows_per_task": 2},
        training={"max_steps": 30, "batch_size": 4} | settings.pop("training", {}),
        **settings,
    )


def stream_of(data: dict[str, TaskData], name: str = "a") -> StreamedRows:
    rows = data[name].train
    assert isinstance(rows, StreamedRows)
    return rows


def trained_on(data: dict[str, TaskData], steps: int, name: str = "a") -> set[str]:
    """Queries of so many batches, in lower case."""
    plan = BatchPlan({name: data[name].train}, {name: steps}, 4, 0)
    return {query.lower() for batch in plan for query in batch.table.data[list(batch.rows)]["query"]}


def held(data: dict[str, TaskData]) -> set[str]:
    return {q.lower() for task in data.values() for part in (task.probe, task.validation) for q in part.data["query"]}


# ---- positions ---------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


def delimited(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def zipped(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "writer"), [("rows.jsonl", write), ("rows.jsonl.gz", zipped), ("r.parquet", parquet), ("r.csv", delimited)]
)
def test_a_position_is_found_again(name: str, writer: Any, tmp_path: Path) -> None:
    """In every format: a stream just opened gives the same window of a position, in whatever order it is asked."""
    writer(tmp_path / name, pairs(23))
    source = Source(path=str(tmp_path / name), streaming=True, window=5)
    stream = RowStream(source, "pairs", None)
    position, windows = stream.start, []
    for _ in range(8):
        rows, end = stream.read(position)
        windows.append((position, rows["query"][:], rows["row"][:]))
        position = json.loads(json.dumps(end))
    assert [rows for _, _, rows in windows] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 21, 22],
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14],
    ]  # fmt: skip
    assert [start["epoch"] for start, *_ in windows] == [0] * 6 + [1] * 2, "the fifth ends at the end of the file"
    for number, (start, *_) in reversed(list(enumerate(windows))):
        fresh, end = RowStream(source, "pairs", None), start
        for _, queries, numbers in windows[number:]:  # each from the position where a resumed stream ended
            rows, end = fresh.read(json.loads(json.dumps(end)))
            assert (rows["query"][:], rows["row"][:]) == (queries, numbers)
            fresh = RowStream(source, "pairs", None) if number % 2 else fresh


def test_filters_and_empty_texts(tmp_path: Path) -> None:
    """A window is so many rows that pass the filter; numbers are those of the file; empty texts are left out."""
    rows = [{"query": f"q{n}" if n != 6 else " ", "positive": "p", "keep": n % 3 == 0} for n in range(20)]
    source = Source(path=write(tmp_path / "r.jsonl", rows), streaming=True, window=3, where={"keep": [True]})
    stream = RowStream(source, "pairs", None)
    position, numbers = stream.start, []
    for _ in range(4):
        window, position = stream.read(position)
        numbers.append(window["row"][:])
    assert numbers == [[0, 3], [9, 12, 15], [18], [0, 3]]


def test_a_window_ends_exactly_with_its_source(tmp_path: Path) -> None:
    stream = RowStream(Source(path=write(tmp_path / "r.jsonl", pairs(6)), streaming=True, window=3), "pairs", None)
    position, numbers = stream.start, []
    for _ in range(4):
        window, position = stream.read(position)
        numbers.append(window["row"][:])
    assert numbers == [[0, 1, 2], [3, 4, 5]] * 2


def test_nothing_passes_the_filter(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", pairs(30))
    tasks = {"a": {"kind": "pairs", "sources": [streamed(path, where={"positive": ["none"]})]}}
    with pytest.raises(InputError, match=rf"^tasks\.a\.sources\.0: {path}: the stream holds no rows"):
        load_tasks(recipe(tasks))


# ---- what is held out --------------------------------------------------------------------------------------------


def test_probe_rows_of_a_stream_are_never_trained_on(tmp_path: Path) -> None:
    """They are of the first window; their queries come again later, in other cases, and are passed over there too."""
    path = write(tmp_path / "r.jsonl", pairs(40, copies=3))
    data = load_tasks(recipe({"a": {"kind": "pairs", "sources": [streamed(path)]}}))
    assert (len(data["a"].probe), len(data["a"].validation)) == (3, 2)
    assert held(data) < {f"q{n}" for n in range(20)} and len(held(data)) == 5
    assert trained_on(data, 120) == {f"q{n}" for n in range(40)} - held(data)


def test_probe_sources_of_a_stream(tmp_path: Path) -> None:
    """The stream cannot be searched for them beforehand: their rows are passed over."""
    path = write(tmp_path / "r.jsonl", pairs(60))
    probe = write(tmp_path / "p.jsonl", pairs(5) + pairs(5, "elsewhere"))
    tasks = {"a": {"kind": "pairs", "sources": [streamed(path)], "probe_sources": [{"path": probe}]}}
    data = load_tasks(recipe(tasks))
    assert all(row.startswith("p0:") for row in data["a"].probe.ids) and held(data) & {f"q{n}" for n in range(5)}
    assert trained_on(data, 60) == {f"q{n}" for n in range(60)} - held(data)


@pytest.mark.parametrize("first", ["a", "b"])
def test_held_out_by_another_task(first: str, tmp_path: Path) -> None:
    """A table's probe rows are passed over by a stream, a stream's probe rows are left out of a table."""
    sources = {"a": streamed(write(tmp_path / "a.jsonl", pairs(60))), "b": {"path": str(tmp_path / "b.jsonl")}}
    write(tmp_path / "b.jsonl", pairs(60))
    order = [first, "ab".replace(first, "")]
    data = load_tasks(recipe({name: {"kind": "pairs", "sources": [sources[name]]} for name in order}))
    assert len(held(data)) > 5, "the two must hold out different rows for this test"
    for name in "ab":
        assert trained_on(data, 60, name) == {f"q{n}" for n in range(60)} - held(data)


def test_without(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", pairs(30))
    data = load_tasks(recipe({"a": {"kind": "pairs", "sources": [streamed(path)]}}))
    rows = stream_of(data)
    gone = rows.first.anchor(0)
    fewer = rows.without({gone})
    assert gone in rows.first.anchors() and gone not in fewer.first.anchors()
    assert len(fewer.first) == len(rows.first) - 1 and fewer.held_out > rows.held_out


def test_the_first_window_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all that checks, splits, hashes and begins to train."""
    windows = []
    original = streams_module.take
    monkeypatch.setattr(streams_module, "take", lambda *args: windows.append(1) or original(*args))
    made = recipe({"a": {"kind": "pairs", "sources": [streamed(write(tmp_path / "r.jsonl", pairs(60)))]}})
    job = expert_job(made, load_tasks(made), "a")
    job.key()
    job.plan().fetch(0)
    assert len(windows) == 1


def test_manifest_of_a_stream(tmp_path: Path) -> None:
    made = recipe({"a": {"kind": "pairs", "sources": [streamed(write(tmp_path / "r.jsonl", pairs(60)))]}})
    written = json.loads(json.dumps(manifest(load_tasks(made), made.probe)))["tasks"]["a"]
    assert written["training_rows"] is None and len(written["probe"]) == 3


# ---- jobs --------------------------------------------------------------------------------------------------------


def test_the_key_changes_with_what_the_stream_gives(tmp_path: Path) -> None:
    def key(rows: list[dict[str, str]], **settings: Any) -> str:
        path = write(tmp_path / "r.jsonl", rows)
        made = recipe({"a": {"kind": "pairs", "sources": [streamed(path, **settings)]}})
        return expert_job(made, load_tasks(made), "a").key()

    rows = pairs(60)
    assert key(rows) == key(rows), "and not with the time at which the file was written"
    longer, other_end = [*rows, {"query": "more", "positive": "p"}], [*rows[:-1], {"query": "q58", "positive": "p0-59"}]
    keys = {
        key(rows),
        key(longer),
        key(other_end),
        key(rows, window=30),
        key(rows, where={"query": [row["query"] for row in rows]}),
        key(pairs(60, "r")),
    }
    assert len(keys) == 6


def test_the_key_of_a_large_stream(tmp_path: Path) -> None:
    """Read at both ends only: of a file of 40 MB the key costs nothing."""
    rows = [{"query": f"q{n}", "positive": "x" * 4000} for n in range(300)]
    path = write(tmp_path / "r.jsonl", rows)
    made = recipe({"a": {"kind": "pairs", "sources": [streamed(path)]}})
    job = expert_job(made, load_tasks(made), "a")
    before = job.key()
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:-20] + content[-20:].replace(b"x", b"y"))
    assert job.key() != before


def test_an_expert_on_a_stream_takes_max_steps(tmp_path: Path) -> None:
    tasks = {"a": {"kind": "pairs", "sources": [streamed(write(tmp_path / "r.jsonl", pairs(60)))]}}
    made = recipe(tasks | {"b": {**tasks["a"], "training": {"max_steps": 7}}})
    data = load_tasks(made)
    assert len(expert_job(made, data, "a").plan()) == 30 and len(expert_job(made, data, "b").plan()) == 7


def joint_recipe(tmp_path: Path, joint: dict[str, Any], **weights: float) -> Recipe:
    tasks = {
        "a": {"kind": "pairs", "sources": [streamed(write(tmp_path / "a.jsonl", pairs(60)))]},
        "b": {"kind": "pairs", "sources": [{"path": write(tmp_path / "b.jsonl", pairs(90, "b"))}]},
    }
    for name, weight in weights.items():
        tasks[name]["weight"] = weight
    return recipe(tasks, joint={"all": joint}, training={"max_steps": 12})


@pytest.mark.parametrize(
    ("joint", "weights", "expected"),
    [
        ({"alpha": 0}, {}, {"a": 12, "b": 12}),
        ({"weights": {"a": 3, "b": 1}}, {}, {"a": 18, "b": 6}),
        ({}, {"a": 1, "b": 2}, {"a": 8, "b": 16}),
    ],
)
def test_joint_baseline_with_a_stream(joint: Any, weights: Any, expected: Any, tmp_path: Path) -> None:
    made = joint_recipe(tmp_path, joint, **weights)
    job = joint_job(made, load_tasks(made), "all")
    assert dict(job.steps) == expected
    assert {batch.task for batch in job.plan()} == {"a", "b"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"joint": {"all": {}}}, "joint.all: task 'a' is a stream, so no share follows from its size; give weights"),
        ({"training": {"max_steps": None}}, "tasks.a: a stream has no length to count epochs by; set max_steps under"),
        ({"cap": 5}, "tasks.a.cap: a stream cannot be capped; give its sources a 'limit'"),
        ({"second": {}}, "tasks.a.sources.1: a table beside a stream; stream all sources of the task"),
        ({"second": {"streaming": True, "limit": 5}}, "tasks.a.sources.1: a table beside a stream"),
    ],
)
def test_what_a_stream_cannot_do(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """Refused in one line, before anything is read: the file does not even exist."""
    path = str(tmp_path / "none.jsonl")
    task: dict[str, Any] = {"kind": "pairs", "sources": [streamed(path)]}
    if "second" in changes:
        task["sources"].append({"path": path} | changes.pop("second"))
    if "cap" in changes:
        task["cap"] = changes.pop("cap")
    with pytest.raises(InputError) as caught:
        load_tasks(recipe({"a": task}, **changes))
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_bad_sources_of_a_stream(tmp_path: Path) -> None:
    """What a table refuses, a stream refuses in its first window; a folder of retrieval data has no rows to stream."""
    labels = write(tmp_path / "l.jsonl", [{"text": f"t{n}", "label": "one"} for n in range(30)])
    (tmp_path / "corpus.jsonl").write_text("")
    for kind, path, expected in [
        ("pairs", str(tmp_path / "none.jsonl"), "tasks.a.sources.0: .*no such data file"),
        ("pairs", labels, "tasks.a.sources.0: .*no column 'query'; found text, label"),
        ("labelled_texts", labels, "tasks.a: all rows have one label"),
        ("retrieval", str(tmp_path), "tasks.a.sources.0: .*a retrieval folder cannot be streamed; drop 'streaming'"),
    ]:
        with pytest.raises(InputError, match=f"^{expected}"):
            load_tasks(recipe({"a": {"kind": kind, "sources": [streamed(path)]}}))


def test_probe_sources_are_no_endless_stream(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", pairs(30))
    with pytest.raises(InputError, match="a stream is read as a whole only with a 'limit'"):
        load_rows(Source(path=path, streaming=True), "pairs")
    assert len(load_rows(Source(path=path, streaming=True, limit=5), "pairs")) == 5


def test_a_column_called_row_is_not_taken_for_the_number(tmp_path: Path) -> None:
    rows = [{**row, "row": "seven"} for row in pairs(4)]
    path = write(tmp_path / "r.jsonl", rows)
    for settings in ({}, {"streaming": True, "limit": 4}):
        assert load_rows(Source(path=path, **settings), "pairs")["row"][:] == [0, 1, 2, 3]


def test_tables_are_as_before(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", pairs(60))
    data = load_tasks(recipe({"a": {"kind": "pairs", "sources": [streamed(path, limit=50)]}}))
    assert isinstance(data["a"].train, TaskRows) and len(data["a"].train) == 45
    assert data["a"].train.size == "45 training rows"
