"""A task's sources in one table, with ids and fingerprints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.data.tasks import fingerprint, load_task
from scalemerge.errors import InputError
from scalemerge.recipe import Recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(kind: str, *paths: str, **settings: Any):
    task = {"kind": kind, "sources": [{"path": path} for path in paths], **settings}
    recipe = Recipe(name="x", base={"path": "b"}, tasks={"a": task})
    return load_task("a", recipe.tasks["a"], recipe.tasks["a"].sources, recipe)


def test_sources_are_put_together(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", [{"query": "q0", "positive": "p0"}, {"query": "q1", "positive": "p1"}])
    second = write(tmp_path / "2.jsonl", [{"anchor": "q2", "answer": "p2"}])
    rows = load("pairs", first, second)
    assert rows.ids == ["s0:0", "s0:1", "s1:0"]
    assert list(rows.data["query"]) == ["q0", "q1", "q2"]
    assert rows.texts[2] == (fingerprint("q2"), fingerprint("p2"))
    assert [rows.source_of(index) for index in range(3)] == ["s0", "s0", "s1"]
    some = rows.select([2, 0])
    assert (some.ids, list(some.data["query"])) == (["s1:0", "s0:0"], ["q2", "q0"])
    assert some.texts == [rows.texts[2], rows.texts[0]]


def test_fingerprints_of_all_texts(tmp_path: Path) -> None:
    """Negatives too: one that is another row's query may not share its batch."""
    path = write(tmp_path / "1.jsonl", [{"query": "q", "positive": "p", "negatives": ["n", "m"]}])
    assert load("triplets", path).texts == [tuple(map(fingerprint, "qpnm"))]


def test_anchors(tmp_path: Path) -> None:
    """A query is seen whatever its answer is; a scored pair is seen in either order, its sentences alone are not."""
    pairs = load(
        "pairs", write(tmp_path / "1.jsonl", [{"query": "q", "positive": "x"}, {"query": "Q ", "positive": "y"}])
    )
    assert pairs.anchor(0) == pairs.anchor(1) and len(pairs.anchors()) == 1
    scored = [("a", "b", 1), ("b", "a", 2), ("a", "c", 3)]
    rows = [{"sentence1": one, "sentence2": two, "score": score} for one, two, score in scored]
    scored_rows = load("scored_pairs", write(tmp_path / "2.jsonl", rows))
    assert scored_rows.anchor(0) == scored_rows.anchor(1) != scored_rows.anchor(2)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_fingerprint_is_blind_to_case_and_space(text: str) -> None:
    assert fingerprint(text) == fingerprint(f"  {text}\n ") == fingerprint(" ".join(text.split()))
    assert 0 <= fingerprint(text) < 2**64
    assert fingerprint(text + "x") != fingerprint(text)


def test_case() -> None:
    assert fingerprint("New  York") == fingerprint("new york") != fingerprint("newyork")


@pytest.mark.parametrize(
    ("kind", "rows", "settings", "expected"),
    [
        ("pairs", [{"query": "a"}], {}, "tasks.a.sources.0: "),
        ("scored_pairs", [{"sentence1": "a", "sentence2": "b", "score": 1}] * 3, {}, "tasks.a: all scores are equal"),
        (
            "labelled_texts",
            [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}],
            {},
            "tasks.a: all rows have one label",
        ),
        (
            "pairs",
            [{"query": "a", "positive": "b"}],
            {"loss": {"name": "infonce", "parameters": {"temprature": 1}}},
            "tasks.a.loss.parameters: loss 'infonce' has no",
        ),
    ],
)
def test_bad_tasks(kind, rows, settings, expected, tmp_path: Path) -> None:
    path = write(tmp_path / "1.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load(kind, path, **settings)
    assert str(caught.value).startswith(expected)


def test_the_source_at_fault_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "1.jsonl", [{"query": "a", "positive": "b"}])
    with pytest.raises(InputError, match=r"^tasks\.a\.sources\.1: .*none\.jsonl: no such data file"):
        load("pairs", good, str(tmp_path / "none.jsonl"))
