"""Fixtures of the evaluation tests: a tiny folder of every task type, a model without weights, the real ones."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

TINY_TASKS = [
    ("tiny-sts", "sts"),
    ("tiny-pairs", "pair_classification"),
    ("tiny-rerank", "reranking"),
    ("tiny-labels", "classification"),
    ("tiny-clusters", "clustering"),
    ("tiny-search", "retrieval"),
]
TOPICS = {
    "weather": "rain snow wind storm cloud sun hail fog",
    "cooking": "bread soup salt pan oven butter flour onion",
    "music": "violin drum song choir piano tune chord opera",
}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")


@pytest.fixture
def rows_writer() -> Callable[[Path, list[dict]], None]:
    return write_rows


@pytest.fixture
def tiny_tasks() -> list[tuple[str, str]]:
    return list(TINY_TASKS)


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """One small set of each type, in the shared layout; word overlap solves most of each, not all."""
    root = tmp_path / "data"
    texts = []
    for label, words in TOPICS.items():
        listed = words.split()
        texts += [
            {"text": f"{listed[i]} {listed[(i + 1) % 8]} {listed[(i + 3) % 8]} today", "label": label} for i in range(8)
        ]
    pairs = []
    for i, first in enumerate(texts):
        second = texts[(i * 5 + 1) % len(texts)]
        same = len(set(first["text"].split()) & set(second["text"].split()))
        pairs.append({"sentence1": first["text"], "sentence2": second["text"], "score": 1.0 + same})
    write_rows(root / "tiny-sts/test.jsonl.gz", pairs)
    labelled = [
        {"sentence1": row["text"], "sentence2": texts[j]["text"], "label": int(row["label"] == texts[j]["label"])}
        for i, row in enumerate(texts)
        for j in ((i + 1) % 24, (i + 9) % 24)
    ]
    write_rows(root / "tiny-pairs/test.jsonl.gz", labelled)
    write_rows(root / "tiny-labels/test.jsonl.gz", texts[::2])
    write_rows(root / "tiny-labels/train.jsonl.gz", texts[1::2])
    write_rows(root / "tiny-clusters/test.jsonl.gz", texts)
    reranked = [
        {"query": words.split()[0], "positive": [words], "negative": [w for n, w in TOPICS.items() if n != label]}
        for label, words in TOPICS.items()
    ]
    write_rows(root / "tiny-rerank/test.jsonl.gz", reranked)
    search = root / "tiny-search"
    corpus = [{"_id": f"d{i}", "title": row["label"], "text": row["text"]} for i, row in enumerate(texts)]
    write_rows(search / "corpus.jsonl.gz", corpus)
    write_rows(search / "queries.test.jsonl.gz", [{"_id": f"q{i}", "text": texts[i]["text"]} for i in range(0, 24, 2)])
    judged = [f"q{i}\td{i}\t1" for i in range(0, 24, 2)]
    (search / "qrels.test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return root


class HashedWords:
    """An encoder without weights: hashed word counts plus a constant that two of them can differ in."""

    def __init__(self, offset: float = 0.0) -> None:
        self.prompts: dict[str, str] = {}
        self.offset = offset
        self.calls = 0

    def encode(self, texts, *, batch_size=64, prompt="", progress=False):
        import torch

        self.calls += 1
        vectors = torch.zeros(len(texts), 32)
        for row, text in enumerate(texts):
            for word in (prompt + text).split():
                vectors[row, zlib.crc32(word.encode()) % 32] += 1.0
        vectors[:, 0] += self.offset
        return torch.nn.functional.normalize(vectors + 1e-3, dim=-1)


@pytest.fixture
def make_encoder() -> type[HashedWords]:
    return HashedWords


@pytest.fixture
def make_model_folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder that has what a revision is made of; the encoder is given beside it."""

    def make(name: str, weights: bytes = b"weights") -> Path:
        folder = tmp_path / name
        (folder / "1_Pooling").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_text('{"hidden_size": 32}')
        modules = [
            {"idx": 0, "path": "", "type": "x.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "x.Pooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
        (folder / "README.md").write_text("---\nbase_model: the/same\n---\n")
        return folder

    return make
