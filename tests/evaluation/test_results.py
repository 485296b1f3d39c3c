"""results.json: schema 1, written in one step, refused when it is not what it says."""

from __future__ import annotations

import json
import os

import pytest

from scalemerge.errors import InputError
from scalemerge.evaluation import results
from scalemerge.evaluation.suites import hub_suite, layout_suite

SCORES = {"scores": {"tiny-sts": 70.5}, "by_type": {"sts": 70.5}, "mean": 70.5, "seconds": 1.0, "revision": "abc"}
COST = {"seconds": 9.0, "examples": 100, "includes": ["expert:sts"]}


@pytest.fixture
def suite(tiny_data):
    return layout_suite("tiny", tiny_data, [("tiny-sts", "sts")])


def test_round_trip(tmp_path, suite):
    path = tmp_path / "run" / "results.json"
    written = results.record_model(path, suite, "base", "models/base", SCORES, COST)
    assert results.load(path) == written
    assert written["suite"] == {
        "name": "tiny",
        "tasks": [{"name": "tiny-sts", "type": "sts", "metric": "cosine_spearman"}],
    }
    assert written["models"]["base"]["cost"] == COST and written["models"]["base"]["mean"] == 70.5
    assert {"torch", "mteb", "device", "cpu_count", "python", "platform", "commit", "date"} <= set(
        written["environment"]
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_models_are_added_and_replaced(tmp_path, suite):
    path = tmp_path / "results.json"
    results.record_model(path, suite, "base", "base", SCORES, COST)
    results.record_model(path, suite, "merge:slerp", "merged", SCORES, {})
    again = results.record_model(path, suite, "base", "base", {**SCORES, "mean": 1.0})
    assert list(again["models"]) == ["base", "merge:slerp"]
    assert again["models"]["base"]["mean"] == 1.0 and again["models"]["base"]["cost"] == COST  # None keeps the cost


def test_another_suite_is_refused(tmp_path, suite):
    path = tmp_path / "results.json"
    results.record_model(path, suite, "base", "base", SCORES, COST)
    with pytest.raises(InputError, match="holds scores of suite 'tiny'"):
        results.record_model(path, hub_suite(["STS12"]), "base", "base", SCORES, COST)


def test_a_failed_write_leaves_the_old_file(tmp_path, suite, monkeypatch):
    path = tmp_path / "results.json"
    results.record_model(path, suite, "base", "base", SCORES, COST)
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        results.record_model(path, suite, "base", "base", {**SCORES, "mean": float("nan")}, COST)

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        results.record_model(path, suite, "base", "base", {**SCORES, "mean": 2.0}, COST)
    assert path.read_text() == before and len(list(tmp_path.glob("*.json*"))) == 1
    assert not list(tmp_path.glob(".results*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[: len(content) // 2], "not readable as JSON"),
        (lambda content: content.replace('"schema": 1', '"schema": 2'), "field 'schema' is 2, this version reads 1"),
        (lambda content: "[]", "field 'schema' is 'list'"),
        (lambda content: content.replace('"mean"', '"average"'), "'models.base.mean' is missing"),
        (lambda content: content.replace('"models"', '"model"'), "'models' is missing"),
        (lambda content: content.replace('"tiny-sts": 70.5', '"tiny-sts": "70"'), "'models.base.scores.tiny-sts'"),
    ],
)
def test_load_names_what_is_wrong(tmp_path, suite, change, words):
    path = tmp_path / "results.json"
    results.record_model(path, suite, "base", "base", SCORES, COST)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=words) as caught:
        results.load(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        results.load(tmp_path / "results.json")


def test_environment_is_plain_json():
    assert json.loads(json.dumps(results.environment("cuda")))["device"] == "cuda"
