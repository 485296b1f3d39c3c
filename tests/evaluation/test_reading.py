"""Caps are deterministic and keep what a score needs; fingerprints follow content and settings."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace

import pytest

from scalemerge.evaluation.reading import fingerprint, read_task
from scalemerge.evaluation.suites import Options, layout_suite


def task_of(data, folder, kind, **caps):
    return layout_suite("x", data, [(folder, kind)], options={folder: Options(**caps)}).tasks[0]


def test_row_caps_are_deterministic_and_follow_the_seed(tiny_data):
    draws = [read_task(task_of(tiny_data, "tiny-sts", "sts", max_rows=9)).rows for _ in range(2)]
    assert draws[0] == draws[1] and len(draws[0]) == 9
    assert draws[0] != read_task(task_of(tiny_data, "tiny-sts", "sts", max_rows=9, seed=1)).rows
    every = read_task(task_of(tiny_data, "tiny-sts", "sts")).rows
    assert [row for row in every if row in draws[0]] == draws[0]  # file order


@pytest.mark.parametrize("cap", [3, 7, 12, 23])
def test_row_caps_keep_the_labels_shares(tiny_data, cap):
    rows = read_task(task_of(tiny_data, "tiny-clusters", "clustering", max_rows=cap)).rows
    counts = Counter(row["label"] for row in rows)
    assert len(rows) == cap and max(counts.values()) - min(counts.values()) <= 1  # the labels are equally frequent


def test_train_cap_is_apart_from_the_row_cap(tiny_data):
    data = read_task(task_of(tiny_data, "tiny-labels", "classification", max_train_rows=6))
    assert len(data.train) == 6 and len(data.rows) == 12
    assert {row["label"] for row in data.train} == {0, 1, 2}


@pytest.mark.parametrize("max_corpus", [1, 6, 15, 100])
def test_retrieval_caps_keep_relevant_documents(tiny_data, max_corpus):
    task = task_of(tiny_data, "tiny-search", "retrieval", max_queries=5, max_corpus=max_corpus)
    data = read_task(task)
    kept = {row["id"] for row in data.corpus}
    assert len(data.queries) == len(data.relevant) == 5
    assert all(set(judged) <= kept for judged in data.relevant.values())
    assert len(kept) == min(24, max(5, max_corpus))
    assert read_task(task) == data


def test_reranking_keeps_candidates_and_judgements(tiny_data):
    data = read_task(task_of(tiny_data, "tiny-rerank", "reranking"))
    assert data.ranked is not None and all(len(candidates) == 3 for candidates in data.ranked.values())
    assert all(sum(judged.values()) == 1 for judged in data.relevant.values())


def test_fingerprint_follows_content_and_settings_not_place_or_packing(tiny_data):
    task = task_of(tiny_data, "tiny-sts", "sts")
    first = fingerprint(task)
    path = tiny_data / "tiny-sts/test.jsonl.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content, compresslevel=1, mtime=1))
    (tiny_data / "tiny-sts").rename(tiny_data / "moved")
    assert fingerprint(replace(task, folder=tiny_data / "moved")) == first
    changes = [Options(max_rows=5), Options(seed=1), Options(experiments=3)]
    others = {fingerprint(replace(task, folder=tiny_data / "moved", options=options)) for options in changes}
    (tiny_data / "moved/test.jsonl.gz").write_bytes(gzip.compress(content.replace(b"2.0", b"2.5", 1)))
    others.add(fingerprint(replace(task, folder=tiny_data / "moved")))
    assert len(others) == 4 and first not in others
