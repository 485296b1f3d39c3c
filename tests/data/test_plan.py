"""The plan of a run: the steps asked for, the same again from any number on; of streams, without reading twice."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.data import plan as plan_module
from scalemerge.data import streams as streams_module
from scalemerge.data.plan import BatchPlan
from scalemerge.data.sampling import batch_stream
from scalemerge.data.streams import StreamedRows, open_task
from scalemerge.data.tasks import TaskRows, fingerprint
from scalemerge.errors import InputError
from scalemerge.recipe import Recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ---- tables ------------------------------------------------------------------------------------------------------


def table(name: str, count: int) -> TaskRows:
    from datasets import Dataset

    data = Dataset.from_dict({"query": [f"a{n}" for n in range(count)], "positive": [f"b{n}" for n in range(count)]})
    return TaskRows(name, "pairs", data, [f"s0:{n}" for n in range(count)], [(n, count + n) for n in range(count)])


def told(plan: BatchPlan) -> list[tuple[str, tuple[int, ...]]]:
    return [(batch.task, batch.rows) for batch in plan]


@given(steps=st.lists(st.integers(0, 8), min_size=1, max_size=4), size=st.integers(2, 5), seed=st.integers(0, 99))
def test_the_plan(steps, size, seed) -> None:
    """Exactly the steps asked for, one task a batch, the same plan again, whatever else is in the plan."""
    tables = {f"task{n}": table(f"task{n}", 20 + n) for n in range(len(steps))}
    wanted = {f"task{n}": count for n, count in enumerate(steps)}
    plan = BatchPlan(tables, wanted, size, seed)
    batches = told(plan)
    assert len(plan) == len(batches) == sum(steps)
    assert Counter(task for task, _ in batches) == Counter({task: count for task, count in wanted.items() if count})
    assert batches == told(BatchPlan(dict(reversed(tables.items())), dict(reversed(wanted.items())), size, seed))
    assert [plan.task(number) for number in range(len(plan))] == [task for task, _ in batches]
    for task, count in wanted.items():
        mine = [rows for name, rows in batches if name == task]
        assert mine == list(itertools.islice(batch_stream(tables[task], size, seed), count))


def test_tasks_alternate() -> None:
    """Not all of one task and then all of the other: the last task would win."""
    batches = told(BatchPlan({"a": table("a", 40), "b": table("b", 40)}, {"a": 50, "b": 50}, 4, 0))
    changes = sum(one[0] != two[0] for one, two in itertools.pairwise(batches))
    assert 30 < changes < 70


@pytest.mark.parametrize("buckets", [1, 3])
def test_tables_need_no_state(buckets: int) -> None:
    """From any number on, on any plan, also backwards: the same batches."""
    tables = {"a": table("a", 30), "b": table("b", 11)}

    def made() -> BatchPlan:
        return BatchPlan(tables, {"a": 12, "b": 9}, 4, 3, length_buckets=buckets)

    expected = told(made())
    for start in range(len(expected)):
        plan = made()
        plan.restore(plan.state(start))
        assert plan.state(start) == {}
        fetched = plan.fetch(start)
        assert (fetched.task, fetched.rows) == expected[start] and fetched.table is tables[fetched.task]
        assert plan.fetch(start).rows == expected[start][1], "twice"
        if start + 2 < len(expected):
            assert plan.fetch(start + 2).rows == expected[start + 2][1], "one left out"
        assert plan.fetch(0).rows == expected[0][1]


def test_numbers_outside() -> None:
    plan = BatchPlan({"a": table("a", 30)}, {"a": 3}, 4, 3)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            plan.fetch(number)


# ---- streams -----------------------------------------------------------------------------------------------------

ROWS: dict[str, Any] = {
    "pairs": lambda n: {"query": f"q{n}", "positive": f"p{n // 2}"},
    "triplets": lambda n: {"query": f"q{n}", "positive": f"p{n}", "negatives": [f"n{n}"] * (n % 3 > 0)},
    "scored_pairs": lambda n: {"sentence1": f"a{n}", "sentence2": f"b{n}", "score": n / 7},
    "labelled_texts": lambda n: {"text": f"t{n}", "label": n % 3},
}


def shards(folder: Path, count: int, kind: str = "pairs", files: int = 1, start: int = 0) -> dict[str, Any]:
    """Rows `start` to `start + count` in JSONL files; a streaming source of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        numbers = range(start + file * count // files, start + (file + 1) * count // files)
        lines = "".join(json.dumps(ROWS[kind](n)) + "\n" for n in numbers)
        (folder / f"train-{file}.jsonl").write_text(lines)
    return {"path": str(folder), "streaming": True}


def opened(kind: str, *sources: dict[str, Any], name: str = "a") -> StreamedRows:
    recipe = Recipe(name="x", base={"path": "b"}, tasks={name: {"kind": kind, "sources": list(sources)}})
    return open_task(name, recipe.tasks[name], recipe)


def planned(rows: StreamedRows, steps: int, size: int = 4, seed: int = 0, buckets: int = 1) -> BatchPlan:
    return BatchPlan({rows.name: rows}, {rows.name: steps}, size, seed, 2, buckets)


def texts_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch as they would be tokenized, with their ids."""
    columns = batch.table.data[list(batch.rows)]
    ids = [batch.table.ids[row] for row in batch.rows]
    prints = [tuple(batch.table.texts[row]) for row in batch.rows]
    return [
        {"id": ids[n], "texts": prints[n], **{key: values[n] for key, values in columns.items()}}
        for n in range(len(ids))
    ]


class Reads:
    """Which rows of which file were read, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        original = streams_module.take

        def take(rows: Any, *rest: Any) -> Any:
            def counted() -> Any:
                for number, row in rows:
                    self.rows.append(number)
                    yield number, row

            return original(counted(), *rest)

        monkeypatch.setattr(streams_module, "take", take)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.mark.parametrize("buckets", [1, 2])
@pytest.mark.parametrize("kind", ROWS)
def test_resuming_a_stream_at_every_batch(kind: str, buckets: int, tmp_path: Path, reads: Reads) -> None:
    """Windows of 10 rows, batches of 4, 37 rows in 3 files, three passes: everywhere the batches of the undisturbed
    run, after the state went through JSON; what is read is the window and the next one."""
    source = shards(tmp_path, 37, kind, files=3) | {"window": 10}
    steps = 26
    plan = planned(opened(kind, source), steps, buckets=buckets)
    expected, states = [], [json.dumps(plan.state(0))]
    for number in range(steps):
        expected.append(texts_of(plan.fetch(number)))
        states.append(json.dumps(plan.state(number + 1)))
    windows = [json.loads(state)["streams"]["a"] for state in states]
    assert windows[-1]["positions"][0]["epoch"] == 2 and any(window["carried"] for window in windows)
    for start in range(steps):
        fresh = planned(opened(kind, source), steps, buckets=buckets)
        reads.rows.clear()
        fresh.restore(json.loads(states[start]))
        assert json.loads(json.dumps(fresh.state(start))) == json.loads(states[start])
        assert texts_of(fresh.fetch(start)) == expected[start]
        beginning = windows[start]["positions"][0]["row"] or 10  # the first window was read when the task was opened
        assert reads.rows == [(beginning + more) % 37 for more in range(len(reads.rows))] and len(reads.rows) <= 20
        for number in range(start + 1, min(start + 6, steps)):
            assert texts_of(fresh.fetch(number)) == expected[number]


def test_the_state_of_a_batch_behind_the_last_one(tmp_path: Path) -> None:
    """Tokenizing ahead: the state saved is that of a batch several windows behind, taken by another thread."""
    rows = opened("pairs", shards(tmp_path, 60) | {"window": 10})
    plan = planned(rows, 40)
    expected = [texts_of(batch) for batch in plan]
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.extend(plan.state(number) for number in range(40)))
    thread.start()
    thread.join()
    for start in (0, 7, 21, 39):
        fresh = planned(rows, 40)
        fresh.restore(states[start])
        assert [texts_of(fresh.fetch(number)) for number in range(start, 40)] == expected[start:]


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "REMEMBERED", 10)
    plan = planned(opened("pairs", shards(tmp_path, 60) | {"window": 8}), 200)
    plan.fetch(199)
    assert plan.state(190)
    with pytest.raises(ValueError, match="batch 20 of task a was left behind"):
        plan.state(20)


def test_going_back_within_what_is_remembered(tmp_path: Path) -> None:
    plan = planned(opened("pairs", shards(tmp_path, 30) | {"window": 8}), 30)
    expected = [texts_of(batch) for batch in plan]

    def windows(count: int) -> list[tuple[Any, ...]]:
        found = [plan.state(number)["streams"]["a"] for number in range(count)]
        return [(w["number"], w["before"], w["carried"], w["positions"][0]["row"]) for w in found]

    before = windows(30)
    for number in (3, 0, 12, 29, 1):
        assert texts_of(plan.fetch(number)) == expected[number]
        assert windows(number) == before[:number]
    plan.fetch(29)
    assert windows(30) == before
    assert [texts_of(batch) for batch in plan] == expected


def test_every_row_in_each_pass(tmp_path: Path) -> None:
    plan = planned(opened("pairs", shards(tmp_path, 38, files=2) | {"window": 9}), 57, size=4)
    batches = list(plan)
    used = Counter(row["id"] for batch in batches for row in texts_of(batch))
    assert set(used) == {f"s0:{n}" for n in range(38)} and set(used.values()) <= {5, 6, 7}
    for batch in batches:
        seen = [text for row in texts_of(batch) for text in row["texts"]]
        assert len(batch.rows) == 4 and len(seen) == len(set(seen)), "p0 is the positive of q0 and q1"


def test_shuffled_within_windows_by_the_seed(tmp_path: Path) -> None:
    """Another order with another seed, in another window and in another pass; none of them leaves its window."""

    def order(seed: int) -> list[list[int]]:
        rows = opened("scored_pairs", shards(tmp_path, 16, "scored_pairs") | {"window": 8})
        batches = list(planned(rows, 4, size=8, seed=seed))
        return [[row["row"] for row in texts_of(batch)] for batch in batches]

    first = order(0)
    assert [sorted(window) for window in first] == [list(range(8)), list(range(8, 16))] * 2
    assert first == order(0) != order(1)
    assert len({tuple(row % 8 for row in window) for window in first}) == 4


def test_sources_are_mixed_by_their_windows(tmp_path: Path) -> None:
    """6 rows of one to 2 of the other, each from the start again on its own; at the end of one fewer, none twice."""
    large = shards(tmp_path / "large", 24, "scored_pairs") | {"window": 6}
    small = shards(tmp_path / "small", 5, "scored_pairs", start=100) | {"window": 2}
    batches = [texts_of(batch) for batch in planned(opened("scored_pairs", large, small), 8, size=8)]
    ids = [Counter(row["id"].split(":")[0] for row in batch) for batch in batches[:2]]
    assert ids == [{"s0": 6, "s1": 2}] * 2
    small_rows = [row["row"] for batch in batches for row in batch if row["id"].startswith("s1")]
    assert sorted(small_rows[:5]) == [0, 1, 2, 3, 4] and len(small_rows) > 10


def test_joint_plan_of_streams_and_tables(tmp_path: Path) -> None:
    """Resumed in the middle: each task goes on where it was."""
    tables = {
        "a": opened("pairs", shards(tmp_path / "a", 23) | {"window": 6}),
        "b": table("b", 30),
        "c": opened("scored_pairs", shards(tmp_path / "c", 50, "scored_pairs") | {"window": 20}, name="c"),
    }
    steps = {"a": 10, "b": 8, "c": 9}
    expected = [(batch.task, texts_of(batch)) for batch in BatchPlan(tables, steps, 4, 0)]
    assert Counter(task for task, _ in expected) == steps
    for start in (1, 13, 26):
        before = BatchPlan(tables, steps, 4, 0)
        before.fetch(start - 1)
        state = before.state(start)
        assert set(state["streams"]) == {"a", "c"}
        plan = BatchPlan(tables, steps, 4, 0)
        plan.restore(state)
        resumed = [plan.fetch(number) for number in range(start, 27)]
        assert [(batch.task, texts_of(batch)) for batch in resumed] == expected[start:]


def test_windows_smaller_than_a_batch(tmp_path: Path) -> None:
    plan = planned(opened("pairs", shards(tmp_path, 40) | {"window": 3}), 12, size=8)
    assert all(len({row["id"] for row in texts_of(batch)}) == 8 for batch in plan)


def test_frequent_texts_do_not_pile_up(tmp_path: Path) -> None:
    """Half of all rows have one text, each batch takes one: what is carried stays as small as a window."""
    lines = [{"query": f"q{n}", "positive": "yes" if n % 2 else f"p{n}"} for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = opened("pairs", {"path": str(tmp_path / "rows.jsonl"), "streaming": True, "window": 30})
    plan = planned(rows, 150)
    carried = []
    for number in range(150):
        batch = texts_of(plan.fetch(number))
        assert sum(row["positive"] == "yes" for row in batch) <= 1
        carried.append(len((plan.state(number)["streams"]["a"]["carried"] or {"ids": []})["ids"]))
    assert max(carried) == 30


def test_what_is_left_over_comes_first_in_the_next_window(tmp_path: Path) -> None:
    rows = opened("scored_pairs", shards(tmp_path, 60, "scored_pairs") | {"window": 30})
    numbers = [{row["row"] for row in texts_of(batch)} for batch in planned(rows, 5, size=8)]
    assert set().union(*numbers[:3]) < set(range(30)), "the first window: three batches of 8"
    assert numbers[3] & set(range(30)) == set(range(30)) - set().union(*numbers[:3]) and len(numbers[3]) == 8


@pytest.mark.parametrize("window", [2, 50, 100_000])
def test_a_batch_that_cannot_be_filled(window: int, tmp_path: Path, reads: Reads) -> None:
    """One text alone, or fewer rows than a batch: said after a pass, not read for ever."""
    lines = [{"query": f"q{n}", "positive": "yes"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    same = opened("pairs", {"path": str(tmp_path / "rows.jsonl"), "streaming": True, "window": window})
    few = opened("pairs", shards(tmp_path / "few", 6) | {"window": window})
    for rows in (same, few):
        with pytest.raises(InputError, match=r"^tasks\.a: cannot fill a batch of 8 with different texts"):
            planned(rows, 5, size=8).fetch(0)
    assert len(reads.rows) < 150


def test_bad_row_in_a_later_window(tmp_path: Path) -> None:
    """Named by file and row when its window is read; training before it went on."""
    source = shards(tmp_path, 40) | {"window": 10}
    lines = (tmp_path / "train-0.jsonl").read_text().splitlines()
    lines[33] = json.dumps({"query": None, "positive": "p"})
    (tmp_path / "train-0.jsonl").write_text("\n".join(lines) + "\n")
    plan = planned(opened("pairs", source), 20)
    assert len(texts_of(plan.fetch(6))) == 4
    with pytest.raises(InputError) as caught:
        plan.fetch(12)
    assert str(caught.value).startswith(f"tasks.a.sources.0: {tmp_path}: row 33: 'query' is None, not a text")


def test_file_broken_in_a_later_window(tmp_path: Path) -> None:
    source = shards(tmp_path, 40, files=2) | {"window": 10}
    with (tmp_path / "train-1.jsonl").open("a") as file:
        file.write("not json\n")
    plan = planned(opened("pairs", source), 20)
    plan.fetch(3)
    with pytest.raises(InputError, match=rf"^tasks\.a\.sources\.0: {tmp_path}: cannot be read"):
        plan.fetch(12)


def test_buckets_in_windows(tmp_path: Path) -> None:
    """Texts of like length together, within a window."""
    lines = [{"query": f"q{n}".ljust(10 + (n * 37) % 300, "x"), "positive": f"p{n}"} for n in range(128)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"path": str(tmp_path / "rows.jsonl"), "streaming": True, "window": 64}

    def spread(buckets: int) -> float:
        plan = planned(opened("pairs", source), 16, size=8, buckets=buckets)
        lengths = [[len(row["query"]) for row in texts_of(batch)] for batch in plan]
        return sum(max(batch) - min(batch) for batch in lengths) / 16

    assert spread(8) < 0.4 * spread(1)


def test_fingerprints_survive_the_state(tmp_path: Path) -> None:
    rows = opened("triplets", shards(tmp_path, 10, "triplets") | {"window": 10})
    batch = planned(rows, 3).fetch(2)
    for row in texts_of(batch):
        assert row["texts"] == tuple(map(fingerprint, [row["query"], row["positive"], *row["negatives"]]))
