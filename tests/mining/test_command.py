"""`scalemerge mine` with a tiny model: every kind of source, and one line for bad input."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge import cli
from scalemerge.data.sources import load_rows
from scalemerge.recipe import Source

Make = Callable[[str], Path]
SMALL = ("--rank-min", "2", "--rank-max", "30", "--negatives", "3", "--no-margin", "--device", "cpu")


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["mine", *map(str, arguments)])
    return int(stop.value.code or 0)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def pairs(tmp_path: Path, texts: list[str]) -> Path:
    rows = [{"question": query, "positive": positive} for query, positive in zip(texts[:40], texts[40:80], strict=True)]
    return write(tmp_path / "pairs.jsonl.gz", rows)


def test_pairs_from_end_to_end(
    tmp_path: Path, pairs: Path, tiny_folders: Make, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out.jsonl.gz"
    assert call(tiny_folders("bert"), "--source", pairs, "--out", out, *SMALL) == 0
    rows = load_rows(Source(path=str(out)), "triplets")
    assert list(rows["query"]) == texts[:40] and list(rows["positive"]) == texts[40:80]
    for positive, negatives in zip(rows["positive"], rows["negatives"], strict=True):
        assert len(set(negatives)) == 3
        assert set(negatives) <= set(texts[40:80]) - {positive}
    shown = capsys.readouterr()
    assert "40 read, 40 written, 0 dropped" in shown.out and "3.00 a row" in shown.out
    assert "embedding documents: 40 texts" in shown.err
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl.gz"]


def test_a_corpus_of_its_own_with_titles(tmp_path: Path, pairs: Path, tiny_folders: Make) -> None:
    corpus = write(
        tmp_path / "corpus.jsonl", [{"title": f"T{n}" if n % 2 else None, "text": f"t{n}"} for n in range(9)]
    )
    out = tmp_path / "out.jsonl"
    assert call(tiny_folders("bert"), "--source", pairs, "--corpus", corpus, "--out", out, *SMALL) == 0
    found = {text for row in load_rows(Source(path=str(out)), "triplets") for text in row["negatives"]}
    assert found <= {f"T{n} t{n}" if n % 2 else f"t{n}" for n in range(9)} and len(found) > 3


def test_a_retrieval_folder_is_searched_whole(tmp_path: Path, tiny_folders: Make, texts: list[str]) -> None:
    folder = tmp_path / "beir"
    write(
        folder / "corpus.jsonl.gz", [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts[:60])]
    )
    write(folder / "queries.test.jsonl", [{"_id": f"q{n}", "text": f"what is {n}"} for n in range(5)])
    judged = "".join(f"q{n}\td{n}\t1\nq{n}\td{n + 5}\t1\n" for n in range(5))
    (folder / "qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    out = tmp_path / "out.jsonl"
    arguments = ("--kind", "retrieval", "--split", "test", "--negatives", "58", "--rank-max", "60", "--rank-min", "0")
    assert call(tiny_folders("bert"), "--source", folder, "--out", out, *arguments, "--no-margin") == 0
    for number, row in enumerate(load_rows(Source(path=str(out)), "triplets")):
        query = number // 2
        assert set(row["negatives"]) == set(texts[:60]) - {texts[query], texts[query + 5]}


def test_triplets_give_their_negatives_to_the_corpus(tmp_path: Path, tiny_folders: Make) -> None:
    rows = [{"anchor": f"q{n}", "positive": f"p{n}", "negatives": [f"n{n}"]} for n in range(6)]
    source, out = write(tmp_path / "triplets.jsonl", rows), tmp_path / "out.jsonl"
    arguments = ("--kind", "triplets", "--negatives", "11", "--rank-min", "0", "--no-margin")
    assert call(tiny_folders("bert"), "--source", source, "--out", out, *arguments) == 0
    first = load_rows(Source(path=str(out)), "triplets")[0]
    assert sorted(first["negatives"]) == sorted({f"{kind}{n}" for kind in "pn" for n in range(6)} - {"p0"})


def test_columns_by_name(tmp_path: Path, tiny_folders: Make) -> None:
    source = write(tmp_path / "odd.jsonl", [{"ask": f"q{n}", "reply": f"p{n}"} for n in range(9)])
    columns = ("--column", "query=ask", "--column", "positive=reply")
    assert call(tiny_folders("bert"), "--source", source, "--out", tmp_path / "out.jsonl", *SMALL, *columns) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--rank-min": "30"}, ["--rank-min 30", "--rank-max 30"]),
        ({"--kind": "scored_pairs"}, ["--kind scored_pairs", "retrieval"]),
        ({"--source": "nowhere.jsonl"}, ["nowhere.jsonl", "no such"]),
        ({"--out": "out.csv"}, ["out.csv", ".jsonl.gz"]),
        ({"--out": "{source}"}, ["--out", "--source", "write elsewhere"]),
        ({"--corpus": "missing.jsonl"}, ["missing.jsonl", "no such"]),
        ({"--corpus": "{labels}"}, ["labels.jsonl", "no column 'text'", "label"]),
        ({"--corpus": "{numbers}"}, ["numbers.jsonl", "row 0", "'text'", "not a text"]),
        ({"--corpus": "{blank}"}, ["blank.jsonl", "no texts"]),
        ({"--column": "query"}, ["--column query", "ROLE=NAME"]),
        ({"--device": "cuda:99"}, ["--device cuda:99"]),
        ({"--device": "gpu"}, ["--device gpu"]),
        ({"model": "{empty}"}, ["empty", "config.json"]),
        ({"model": "./nowhere"}, ["nowhere", "no such model folder"]),
        ({"model": "{cut}"}, ["cut", "cannot load a model"]),
        ({"model": "{nan}"}, ["NaN", "weights"]),
    ],
)
def test_bad_input(
    tmp_path: Path, pairs: Path, tiny_folders: Make, capsys: pytest.CaptureFixture[str], changes: dict[str, str],
    says: list[str],
) -> None:  # fmt: skip
    places = {"source": pairs}
    places["labels"] = write(tmp_path / "labels.jsonl", [{"label": "a"}])
    places["numbers"] = write(tmp_path / "numbers.jsonl", [{"text": 5}])
    places["blank"] = write(tmp_path / "blank.jsonl", [{"text": " "}])
    for name in ("empty", "cut", "nan"):
        places[name] = tmp_path / name
    places["empty"].mkdir()
    for name in ("cut", "nan"):
        shutil.copytree(tiny_folders("bert"), places[name])
    weights = places["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = places["nan"] / weights.name
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(broken).items()}
    save_file(tensors, broken, metadata={"format": "pt"})
    given = {"model": str(tiny_folders("bert")), "--source": str(pairs), "--out": str(tmp_path / "out.jsonl")}
    given |= {"--rank-min": "2", "--rank-max": "30", "--negatives": "3", "--device": "cpu"}
    given |= {key: value.format(**places) for key, value in changes.items()}
    before = pairs.read_bytes()
    assert call(given.pop("model"), *(text for pair in given.items() for text in pair)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for text in says:
        assert text in errors[0]
    assert pairs.read_bytes() == before and not (tmp_path / "out.jsonl").exists()
