"""Suites, and what `check` finds before anything expensive starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import METRICS
from scalemerge.evaluation.suites import (
    DOCS_TASKS,
    FAST_OPTIONS,
    SHARED_TASKS,
    Options,
    check,
    docs_suite,
    hub_suite,
    layout_suite,
    shared_suite,
)


def test_suites_import_neither_torch_nor_mteb():
    code = (
        "import sys; import scalemerge.evaluation.suites, scalemerge.evaluation.results, scalemerge.evaluation.scorer;"
        "print(sorted({'torch', 'mteb', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_shared_suite_names_every_type_and_fast_is_a_part_of_it(shared_data):
    full, fast = shared_suite(shared_data), shared_suite(shared_data, fast=True)
    assert len(full) == 27 and {task.type for task in full} == set(METRICS) == {task.type for task in fast}
    assert set(FAST_OPTIONS) <= set(SHARED_TASKS)
    assert [task.name for task in shared_suite(shared_data, ["trecqa", "sts12"])] == ["trecqa", "sts12"]
    assert shared_suite(shared_data, ["banking77"]).tasks[0].train_split == "train"
    check(full)


def test_shared_suite_rejects_unknown_names(tmp_path):
    with pytest.raises(InputError, match="unknown task 'sts99'"):
        shared_suite(tmp_path, ["sts99"])


def test_docs_suite_is_a_layout_suite(tmp_path):
    for folder, _ in DOCS_TASKS:
        (tmp_path / folder).mkdir()
    suite = docs_suite(tmp_path)
    assert suite.name == "docs" and [(task.name, task.type) for task in suite] == list(DOCS_TASKS)


def test_hub_suite_has_names_only():
    suite = hub_suite(["STS12", "SciFact"])
    assert [(task.name, task.folder, task.type) for task in suite] == [("STS12", None, "hub"), ("SciFact", None, "hub")]
    with pytest.raises(InputError, match="named twice"):
        hub_suite(["STS12", "STS12"])
    with pytest.raises(InputError, match="no task"):
        hub_suite([])


def test_layout_suite_errors(tiny_data):
    with pytest.raises(InputError, match="no such data folder"):
        layout_suite("x", tiny_data / "absent", [("a", "sts")])
    with pytest.raises(InputError, match="no such folder, wanted by task 'a'; folders there: tiny-clusters"):
        layout_suite("x", tiny_data, [("a", "sts")])
    with pytest.raises(InputError, match="type 'sentiment' of task 'tiny-sts'"):
        layout_suite("x", tiny_data, [("tiny-sts", "sentiment")])


def test_check_accepts_good_data(tiny_data, tiny_tasks):
    check(layout_suite("tiny", tiny_data, tiny_tasks))


STS = {"sentence1": "a", "sentence2": "b", "score": 1.0}


@pytest.mark.parametrize(
    ("folder", "kind", "file", "rows", "words"),
    [
        ("tiny-sts", "sts", "test", [], "has no row"),
        ("tiny-sts", "sts", "test", [STS, {**STS, "score": float("nan")}], "line 2: field 'score' is not a finite"),
        ("tiny-sts", "sts", "test", [STS, {**STS, "score": "3"}], "line 2: field 'score' is not a number"),
        ("tiny-sts", "sts", "test", [{"sentence1": "a", "score": 1}], "field 'sentence2' is missing"),
        ("tiny-sts", "sts", "test", [{**STS, "sentence1": None}], "field 'sentence1' is not a string"),
        ("tiny-sts", "sts", "test", [STS, STS], "field 'score' has one value only"),
        ("tiny-pairs", "pair_classification", "test", [{"sentence1": "a", "sentence2": "b", "label": 2}], "not 0 or 1"),
        ("tiny-pairs", "pair_classification", "test", [{"sentence1": "a", "sentence2": "b", "label": 1}], "one value"),
        (
            "tiny-labels",
            "classification",
            "train",
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            "is in no",
        ),
        ("tiny-clusters", "clustering", "test", [{"text": "a", "label": 3}], "is not a label"),
        ("tiny-rerank", "reranking", "test", [{"query": "a", "positive": ["b"], "negative": []}], "field 'negative'"),
        ("tiny-search", "retrieval", "corpus", [{"_id": "d0", "text": "a"}], "corpus-id 'd2' is not in corpus"),
        ("tiny-search", "retrieval", "corpus", [{"_id": "d0", "text": "a"}] * 2, "'d0' occurs twice"),
        ("tiny-search", "retrieval", "queries.test", [{"_id": "q0", "text": "a"}], "query-id 'q2' is not in queries"),
    ],
)
def test_check_names_file_field_and_remedy(tiny_data, rows_writer, folder, kind, file, rows, words):
    path = tiny_data / folder / f"{file}.jsonl.gz"
    rows_writer(path, rows)
    with pytest.raises(InputError, match=words) as caught:
        check(layout_suite("tiny", tiny_data, [(folder, kind)]))
    assert str(tiny_data / folder) in str(caught.value) and "\n" not in str(caught.value)


def test_check_finds_missing_and_broken_files(tiny_data):
    suite = layout_suite("tiny", tiny_data, [("tiny-sts", "sts")])
    path = tiny_data / "tiny-sts/test.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not readable"):
        check(suite)
    path.unlink()
    with pytest.raises(InputError, match=r"no such file.*here: nothing"):
        check(suite)
    path.with_suffix("").write_text('{"sentence1": \n')
    with pytest.raises(InputError, match="line 1 is not JSON"):
        check(suite)


def test_check_reads_judgements(tiny_data):
    suite = layout_suite("tiny", tiny_data, [("tiny-search", "retrieval")])
    path = tiny_data / "tiny-search/qrels.test.tsv"
    for text, words in [
        ("q0\td0\t1\n", "the header is"),
        ("query-id\tcorpus-id\tscore\nq0 d0 1\n", "line 2: needs"),
        ("query-id\tcorpus-id\tscore\nq0\td0\t0\n", "no query has a relevant document"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            check(suite)


def test_options_are_part_of_the_definition(tiny_data):
    suite = layout_suite("tiny", tiny_data, [("tiny-sts", "sts")], options={"tiny-sts": Options(max_rows=5)})
    assert suite.tasks[0].settings()["options"]["max_rows"] == 5
