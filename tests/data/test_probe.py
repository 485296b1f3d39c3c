"""Probe sets: held out from every task, balanced, seeded, written down."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalemerge.data import probe as probe_module
from scalemerge.data.probe import load_tasks, manifest
from scalemerge.data.tasks import TaskRows, fingerprint
from scalemerge.errors import InputError
from scalemerge.recipe import Recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def pairs(numbers, prefix: str = "q") -> list[dict[str, str]]:
    return [{"query": f"{prefix}{n}", "positive": f"answer {prefix}{n}"} for n in numbers]


def recipe(tasks: dict[str, dict], **probe: Any) -> Recipe:
    return Recipe(
        name="x", base={"path": "b"}, tasks=tasks, probe={"rows_per_task": 6, "validation_rows_per_task": 3} | probe
    )


def anchors(rows: TaskRows) -> set[int]:
    return {rows.texts[index][0] for index in range(len(rows))}


def test_disjoint_and_sized(tmp_path: Path) -> None:
    made = recipe({"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", pairs(range(100)))]}})
    data = load_tasks(made)["a"]
    assert (len(data.probe), len(data.validation), len(data.train)) == (6, 3, 91)
    assert not anchors(data.probe) & anchors(data.validation)
    assert not (anchors(data.probe) | anchors(data.validation)) & anchors(data.train)


def test_disjoint_from_every_task(tmp_path: Path) -> None:
    """A query of two tasks that one of them holds out is trained on by neither, in whatever case it is written."""
    tasks = {
        "a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", pairs(range(60)))]},
        "b": {"kind": "pairs", "sources": [write(tmp_path / "b.jsonl", pairs(range(30, 90), prefix="Q"))]},
    }
    split = load_tasks(recipe(tasks))
    held = set().union(*(anchors(part) for data in split.values() for part in (data.probe, data.validation)))
    for data in split.values():
        assert not held & anchors(data.train)
    shared = {fingerprint(f"q{n}") for n in range(30, 60)}
    assert held & shared, "the test needs a held-out row that both tasks have"


def test_repeated_queries_do_not_leak(tmp_path: Path) -> None:
    """All rows of a held-out query are held out, not only the one that was drawn."""
    rows = pairs([n // 5 for n in range(200)])
    for number, row in enumerate(rows):
        row["positive"] = f"answer {number}"
    data = load_tasks(recipe({"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", rows)]}}))["a"]
    assert len(anchors(data.probe)) == len(data.probe), "one row a query"
    assert not anchors(data.probe) & anchors(data.train)
    assert len(data.train) == 200 - 5 * (len(data.probe) + len(data.validation))


def test_balanced_over_sources(tmp_path: Path) -> None:
    """The large source does not drown the small one."""
    sources = [write(tmp_path / "big.jsonl", pairs(range(300))), write(tmp_path / "small.jsonl", pairs(range(20), "s"))]
    data = load_tasks(
        recipe({"a": {"kind": "pairs", "sources": sources}}, rows_per_task=12, validation_rows_per_task=6)
    )["a"]
    counts = Counter(rows.source_of(i) for rows in (data.probe, data.validation) for i in range(len(rows)))
    assert counts == {"s0": 9, "s1": 9}


def test_seeded(tmp_path: Path) -> None:
    tasks = {"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", pairs(range(100)))]}}
    first, again = load_tasks(recipe(tasks))["a"], load_tasks(recipe(tasks))["a"]
    assert (first.probe.ids, first.validation.ids) == (again.probe.ids, again.validation.ids)
    assert load_tasks(recipe(tasks, seed=1))["a"].probe.ids != first.probe.ids


def test_manifest(tmp_path: Path) -> None:
    """Row ids that lead back to the rows of the file; JSON as it is."""
    rows = pairs(range(100))
    made = recipe({"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", rows)]}}, seed=5)
    split = load_tasks(made)
    written = json.loads(json.dumps(manifest(split, made.probe)))
    assert written["seed"] == 5
    task = written["tasks"]["a"]
    assert task["training_rows"] == 91 and len(task["probe"]) == 6 and len(task["validation"]) == 3
    for row_id, query in zip(task["probe"], split["a"].probe.data["query"], strict=True):
        source, number = row_id.split(":")
        assert source == "s0" and rows[int(number)]["query"] == query


def test_small_tasks_give_at_most_a_quarter(tmp_path: Path) -> None:
    made = recipe({"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", pairs(range(24)))]}})
    data = load_tasks(made)["a"]
    assert (len(data.probe), len(data.validation), len(data.train)) == (4, 2, 18)


@pytest.mark.parametrize("count", [1, 5, 15])
def test_too_small(count: int, tmp_path: Path) -> None:
    made = recipe({"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", pairs(range(count)))]}})
    with pytest.raises(InputError, match=rf"tasks\.a: {count} rows are too few for a probe set; give more data"):
        load_tasks(made)


def test_what_another_task_holds_out_is_taken_away(tmp_path: Path) -> None:
    """Two tasks of the same queries, one of which has probe sources of its own."""
    source = write(tmp_path / "a.jsonl", pairs(range(16)))
    given = write(tmp_path / "p.jsonl", pairs(range(9), "p"))
    tasks = {
        "a": {"kind": "pairs", "sources": [write(tmp_path / "big.jsonl", pairs(range(16)))]},
        "b": {"kind": "pairs", "sources": [source], "probe_sources": [given]},
    }
    split = load_tasks(recipe(tasks, rows_per_task=2, validation_rows_per_task=2))
    assert len(split["b"].train) == 12, "what task a holds out is taken from task b"


def test_cap(tmp_path: Path) -> None:
    """Training rows only, a seeded choice; the probe set is not made smaller."""
    tasks = {"a": {"kind": "pairs", "cap": 20, "sources": [write(tmp_path / "a.jsonl", pairs(range(100)))]}}
    data, again = (load_tasks(recipe(tasks))["a"] for _ in range(2))
    assert (len(data.train), len(data.probe)) == (20, 6)
    assert data.train.ids == again.train.ids != [f"s0:{n}" for n in range(20)]


def test_scored_pairs_and_labels(tmp_path: Path) -> None:
    """A pair in the other order is the same pair; labelled texts go by their text."""
    forward = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "score": n % 5} for n in range(40)]
    back = [{"sentence1": row["sentence2"], "sentence2": row["sentence1"], "score": row["score"]} for row in forward]
    labels = [{"text": f"t{n}", "label": n % 3} for n in range(60)]
    tasks = {
        "sts": {"kind": "scored_pairs", "sources": [write(tmp_path / "s.jsonl", forward + back)]},
        "topics": {"kind": "labelled_texts", "sources": [write(tmp_path / "l.jsonl", labels)]},
    }
    split = load_tasks(recipe(tasks))
    for data in split.values():
        assert not (data.probe.anchors() | data.validation.anchors()) & data.train.anchors()
    assert len(split["sts"].train) == 80 - 2 * 9


# ---- probe_sources -----------------------------------------------------------------------------------------------


def test_probe_sources(tmp_path: Path) -> None:
    """Rows of their own: no training row is held out, ids say that they are of the probe sources."""
    tasks = {"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", pairs(range(50)))],
                   "probe_sources": [write(tmp_path / "p.jsonl", pairs(range(9), "p"))]}}  # fmt: skip
    data = load_tasks(recipe(tasks))["a"]
    assert (len(data.train), len(data.probe), len(data.validation)) == (50, 6, 3)
    assert all(row_id.startswith("p0:") for row_id in data.probe.ids + data.validation.ids)


@pytest.mark.parametrize("other", [False, True])
def test_probe_row_in_the_training_data(other: bool, tmp_path: Path) -> None:
    """Of the same task or of another one; the row is named, whatever its case."""
    probe = pairs(range(9), "p")
    probe[7] = {"query": " Q3", "positive": "something else"}
    training = write(tmp_path / "a.jsonl", pairs(range(50)))
    clean = write(tmp_path / "c.jsonl", pairs(range(50), "c"))
    tasks = {"a": {"kind": "pairs", "sources": [clean if other else training],
                   "probe_sources": [write(tmp_path / "p.jsonl", probe)]}}  # fmt: skip
    if other:
        tasks["b"] = {"kind": "pairs", "sources": [training]}
    with pytest.raises(InputError) as caught:
        load_tasks(recipe(tasks))
    message = str(caught.value)
    assert message.startswith("tasks.a.probe_sources: probe row p0:7 is in the training data of")
    assert f"'{'b' if other else 'a'}'" in message


def test_bad_probe_source_is_named(tmp_path: Path) -> None:
    tasks = {"a": {"kind": "pairs", "sources": [write(tmp_path / "a.jsonl", pairs(range(50)))],
                   "probe_sources": [{"path": str(tmp_path / "none.jsonl")}]}}  # fmt: skip
    with pytest.raises(InputError, match=r"^tasks\.a\.probe_sources\.0: .*no such data file"):
        load_tasks(recipe(tasks))


# ---- any data ----------------------------------------------------------------------------------------------------


@given(
    first=st.lists(st.integers(0, 60), min_size=20, max_size=60),
    second=st.lists(st.integers(30, 90), min_size=20, max_size=60),
    rows=st.integers(2, 12),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_never_a_held_out_row_in_training(first, second, rows, seed) -> None:
    """Any overlap within and between two tasks: disjoint, one row an anchor, every other row is kept."""
    from datasets import Dataset

    def table(name: str, numbers: list[int]) -> TaskRows:
        texts = [(n, 1000 + index) for index, n in enumerate(numbers)]
        data = Dataset.from_dict({"query": [str(n) for n in numbers]})
        return TaskRows(name, "pairs", data, [f"s{n % 2}:{i}" for i, n in enumerate(numbers)], texts)

    tables = {"a": table("a", first), "b": table("b", second)}
    made = recipe({name: {"kind": "pairs", "sources": [{"path": name}]} for name in tables},
                  rows_per_task=rows, validation_rows_per_task=rows, seed=seed)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "load_task", lambda name, *rest: tables[name])
        try:
            split = load_tasks(made)
        except InputError as error:
            assert "too few for a probe set" in str(error) or "no training rows are left" in str(error)
            return
    held = [
        rows.anchor(i) for data in split.values() for rows in (data.probe, data.validation) for i in range(len(rows))
    ]
    for name, data in split.items():
        own = [rows.anchor(i) for rows in (data.probe, data.validation) for i in range(len(rows))]
        assert len(own) == len(set(own))
        assert data.train.ids == [
            i for i, n in zip(tables[name].ids, (first, second)[name == "b"]) if n not in set(held)
        ]
