"""Mining as a whole: what must never be a negative, what is written, and what a killed run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from scalemerge.data.sources import load_rows
from scalemerge.errors import InputError
from scalemerge.mining import Rules, mine
from scalemerge.mining.texts import number_texts
from scalemerge.recipe import Source

Mined = Callable[[Path], list[dict[str, Any]]]
ALL = Rules(negatives=50, rank_min=0, rank_max=50, margin_relative=None)
ROWS = [(f"query {number % 30}", f"positive {number}") for number in range(40)]
CORPUS = [positive for _, positive in ROWS] + [f"other {number}" for number in range(60)]


def test_known_positives_and_the_query_are_kept_out(tmp_path: Path, fake: Any, mined: Mined) -> None:
    """All else of a small corpus is taken: what is missing is exactly what the rules keep out."""
    rows = [("Apple", "red fruit"), ("apple ", "round fruit"), ("pear", "green fruit")]
    corpus = ["red fruit", "RED  Fruit", "round fruit", "green fruit", "APPLE", "pear", "stone", "stone", " "]
    summary = mine(fake(), rows, corpus, tmp_path / "out.jsonl", ALL, revision="r")
    found = mined(tmp_path / "out.jsonl")
    assert [(row["query"], row["positive"]) for row in found] == rows
    assert set(found[0]["negatives"]) == {"green fruit", "pear", "stone"}
    assert set(found[1]["negatives"]) == {"green fruit", "pear", "stone"}
    assert set(found[2]["negatives"]) == {"red fruit", "round fruit", "APPLE", "stone"}
    assert (summary.queries, summary.corpus, summary.repeated) == (2, 6, 2)
    assert (summary.removed["positives"], summary.removed["itself"]) == (3, 2)
    assert (summary.rows, summary.written, summary.negatives, summary.short) == (3, 3, 10, 3)


def test_a_positive_outside_the_corpus_gives_the_margin_only(tmp_path: Path, fake: Any, mined: Mined) -> None:
    told = {"q": [1, 0], "p": [0.6, 0.8], "near": [1, 0.01], "far": [0.2, 1]}
    rules = Rules(negatives=2, rank_min=0, rank_max=2)
    summary = mine(fake(told), [("q", "p")], ["near", "far"], tmp_path / "out.jsonl", rules, revision="r")
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["negatives"] == ["far"]
    assert row["positive_score"] == pytest.approx(0.6, abs=1e-6)
    assert row["scores"] == [pytest.approx(0.2 / 1.04**0.5, abs=1e-6)]
    assert summary.positive_score == pytest.approx(0.6) and summary.negative_score == pytest.approx(row["scores"][0])
    assert summary.removed["margin_relative"] == 1 and summary.short == 1
    assert summary.removed["positives"] == 0
    assert "1 refused by --margin-relative 0.95" in "\n".join(summary.lines(rules))


def test_only_what_would_have_ranked_counts_as_kept_out(tmp_path: Path, fake: Any) -> None:
    """The positive of query a is its nearest text; that of b is its farthest, behind the window."""
    told = {"a": [1, 0], "b": [0, 1], "pa": [1, 0.1], "pb": [1, -2], "x": [1, 1], "y": [1, 2], "z": [2, 1]}
    rules = Rules(negatives=2, rank_min=0, rank_max=2, margin_relative=None)
    rows = [("a", "pa"), ("b", "pb")]
    summary = mine(fake(told), rows, ["pa", "pb", "x", "y", "z"], tmp_path / "out.jsonl", rules, revision="r")
    assert summary.removed["positives"] == 1


def test_against_brute_force(tmp_path: Path, fake: Any, mined: Mined) -> None:
    rules = Rules(negatives=4, rank_min=3, rank_max=30, margin_relative=0.9)
    encoder = fake()
    mine(encoder, ROWS, CORPUS, tmp_path / "out.jsonl", rules, revision="r")
    vector = {text: F.normalize(encoder.vector(text).double(), dim=0) for text in {*CORPUS, *(q for q, _ in ROWS)}}
    for row, (query, positive) in zip(mined(tmp_path / "out.jsonl"), ROWS, strict=True):
        known = {text for other, text in ROWS if other == query}
        ranked = sorted((t for t in CORPUS if t not in known), key=lambda t: -float(vector[query] @ vector[t]))
        own = float(vector[query] @ vector[positive])
        bound = own - 0.1 * abs(own)
        passing = [text for text in ranked[3:30] if float(vector[query] @ vector[text]) < bound]
        assert row["negatives"] == passing[:4]


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_chunks_and_shards_do_not_change_the_file(tmp_path: Path, fake: Any, sampling: str) -> None:
    rules = Rules(negatives=4, rank_min=2, rank_max=40, sampling=sampling)
    written = []
    for number, sizes in enumerate([(1024, 16384, 512), (7, 13, 9), (1, 1, 1), (30, 50, 100)]):
        chunk, block, shard = sizes
        options = {"query_chunk": chunk, "corpus_block": block, "shard_texts": shard}
        mine(fake(), ROWS, CORPUS, tmp_path / f"{number}.jsonl", rules, revision="r", **options)
        written.append((tmp_path / f"{number}.jsonl").read_text())
    assert len(set(written)) == 1


def test_reads_back_as_triplets(tmp_path: Path, fake: Any) -> None:
    """Compressed, with rows that have no negatives, and texts that are not English."""
    told = {"q": [0.0, 1.0], "low": [1.0, -0.1], "élan\u2028река": [1.0, 0.0], "東京": [1.0, 0.1], "x": [0.0, 1.0]}
    rows = [("q", "low"), ("q", "low"), ("x", "東京"), ("q", "x"), ("élan\u2028река", "x")]
    rules = Rules(negatives=2, rank_min=0, rank_max=3, margin_relative=1.0)
    out = tmp_path / "out.jsonl.gz"
    summary = mine(fake(told), rows, list(told), out, rules, revision="r")
    read = load_rows(Source(path=str(out)), "triplets")
    assert list(zip(read["query"], read["positive"], strict=True)) == rows
    assert read["negatives"][0] == [] and "élan\u2028река" in read["negatives"][3]
    assert summary.empty == sum(not negatives for negatives in read["negatives"]) > 0
    assert sorted(read.column_names) == ["negatives", "positive", "query", "row"]
    dropping = Rules(negatives=2, rank_min=0, rank_max=3, margin_relative=1.0, min_negatives=1)
    fewer = mine(fake(told), rows, list(told), out, dropping, revision="r")
    assert fewer.written == len(load_rows(Source(path=str(out)), "triplets")) == len(rows) - summary.empty
    assert fewer.empty == 0


def test_a_killed_run_continues(tmp_path: Path, fake: Any) -> None:
    out, work = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial-embeddings"
    rules = Rules(negatives=3, rank_min=2, rank_max=20)
    options: dict[str, Any] = {"revision": "r", "shard_texts": 10}
    whole = fake()
    mine(whole, ROWS, CORPUS, tmp_path / "whole.jsonl", rules, **options)
    killed = fake(lives=7)
    with pytest.raises(KeyboardInterrupt):
        mine(killed, ROWS, CORPUS, out, rules, **options)
    assert not out.exists() and len(list(work.iterdir())) == 7
    cut = sorted(work.iterdir())[0]
    cut.write_bytes(cut.read_bytes()[:50])  # a shard that a power cut left unfinished
    second = fake()
    mine(second, ROWS, CORPUS, out, rules, **options)
    assert len(second.encoded) == len(whole.encoded) - 60
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("change", ["revision", "prompt", "texts"])
def test_shards_of_something_else_are_not_taken(tmp_path: Path, fake: Any, change: str) -> None:
    out = tmp_path / "out.jsonl"
    rules = Rules(negatives=3, rank_min=2, rank_max=20)
    with pytest.raises(KeyboardInterrupt):
        mine(fake(lives=2), ROWS, CORPUS, out, rules, revision="r", shard_texts=70)
    again = fake()
    if change == "prompt":
        again.prompts = {"query": "query: ", "document": "passage: "}
    rows = [(query + "?", positive) for query, positive in ROWS] if change == "texts" else ROWS
    corpus = [text + "!" for text in CORPUS] if change == "texts" else CORPUS
    mine(again, rows, corpus, out, rules, revision="other" if change == "revision" else "r", shard_texts=70)
    assert len(again.encoded) >= 130
    assert not list(tmp_path.glob("*partial*"))


def test_prompts_are_the_models_unless_given(tmp_path: Path, fake: Any) -> None:
    rules = Rules(negatives=1, rank_min=0, rank_max=2, margin_relative=None)
    encoder = fake()
    encoder.prompts = {"query": "Q: ", "document": "D: "}
    mine(encoder, [("a", "b")], ["b", "c"], tmp_path / "out.jsonl", rules, revision="r", document_prompt="")
    assert encoder.encoded == ["Q: a", "b", "c"]


@pytest.mark.parametrize("broken", [[float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0]])
def test_broken_embeddings(tmp_path: Path, fake: Any, broken: list[float]) -> None:
    told = {"q": [1, 0], "p": [1, 1], "bad": broken}
    rules = Rules(negatives=1, rank_min=0, rank_max=2)
    with pytest.raises(InputError, match=r"embeddings of documents.*'bad'.*weights"):
        mine(fake(told), [("q", "p")], ["p", "bad"], tmp_path / "out.jsonl", rules, revision="r")
    assert not (tmp_path / "out.jsonl").exists()


def test_refused_before_anything_is_embedded(tmp_path: Path, fake: Any) -> None:
    encoder = fake()
    with pytest.raises(InputError, match=r"--rank-min 10: passes over the whole corpus of 10"):
        mine(encoder, ROWS, CORPUS[:10], tmp_path / "out.jsonl", Rules(), revision="r")
    with pytest.raises(InputError, match="no rows"):
        mine(encoder, [], CORPUS, tmp_path / "out.jsonl", Rules(), revision="r")
    with pytest.raises(InputError, match=r"--out .*\.jsonl"):
        mine(encoder, ROWS, CORPUS, tmp_path / "out.parquet", Rules(), revision="r")
    assert not encoder.encoded


def test_nothing_passes(tmp_path: Path, fake: Any) -> None:
    """No file, a remedy, and the embeddings kept for the next try."""
    told = {"q": [1, 0], "p": [0.1, 1], "x": [1, 0.1]}
    rules = Rules(negatives=1, rank_min=0, rank_max=2)
    with pytest.raises(InputError, match=r"no row has 1 negatives.*--margin-relative"):
        mine(fake(told), [("q", "p")], ["p", "x"], tmp_path / "out.jsonl", rules, revision="r")
    again = fake(told)
    mine(again, [("q", "p")], ["p", "x"], tmp_path / "out.jsonl", Rules(1, 0, 2, None, None), revision="r")
    assert not again.encoded


def test_numbers_of_texts() -> None:
    texts = number_texts([("a", "x"), ("A", "y"), ("b", "z")], ["x", "X ", "a", "y", ""])
    assert texts.documents == ["x", "a", "y", "z"]
    assert texts.searched == 3 and texts.repeated == 1
    assert texts.queries == ["a", "b"]
    assert texts.rows == [(0, 0), (0, 2), (1, 3)]
    assert texts.positives == [{0, 2}, {3}]
    assert texts.itself == [1, -1]


@pytest.mark.parametrize("of", ["margins", "ranks"])
def test_agrees_with_sentence_transformers(
    tmp_path: Path, tiny_folders: Any, texts: list[str], mined: Mined, of: str
) -> None:
    """Margins and ranks one at a time: together, sentence-transformers counts ranks after the margins, we before."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from datasets import Dataset

    from scalemerge.encoder import Encoder

    encoder = Encoder.load(tiny_folders("bert"))
    encoder.save(tmp_path / "model")
    rows = list(zip(texts[:40], texts[40:80], strict=True))
    theirs: dict[str, Any] = {"range_min": 3, "range_max": 40}
    rules = Rules(negatives=2, rank_min=3, rank_max=40, margin_relative=None)
    if of == "margins":
        theirs = {"range_max": 60, "relative_margin": 0.004, "absolute_margin": 0.002}
        rules = Rules(2, 0, 60, margin_absolute=0.002, margin_relative=0.996, min_negatives=2)
    other = sentence_transformers.util.mine_hard_negatives(
        Dataset.from_dict({"query": [query for query, _ in rows], "positive": [positive for _, positive in rows]}),
        sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu"),
        corpus=texts[40:],
        num_negatives=2,
        output_format="n-tuple",
        verbose=False,
        **theirs,
    )
    expected = {row["query"]: [row["negative_1"], row["negative_2"]] for row in other}
    mine(encoder, rows, texts[40:], tmp_path / "out.jsonl", rules, revision="r")
    assert {row["query"]: row["negatives"] for row in mined(tmp_path / "out.jsonl")} == expected
    assert len(expected) == 40 if of == "ranks" else 5 < len(expected) < 40
