"""A whole run in miniature: a tiny random-weight model, three small tasks with structure to learn, two test sets."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = (  # noqa: SIM905
    "apple river stone cloud engine paper window garden metal forest bridge candle mirror pocket rocket silver "
    "tunnel velvet winter yellow"
).split()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def phrase(generator: random.Random, length: int = 4) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(length))


def write_data(folder: Path) -> Path:
    """Training files and an evaluation folder in the shared layout."""
    generator = random.Random(0)
    pairs = [{"query": (q := phrase(generator)), "positive": f"{q.upper()} {n}"} for n in range(160)]
    scored = []
    for number in range(160):
        first = phrase(generator)
        same = number % 5
        second = " ".join(first.split()[:same] + phrase(generator, 5 - same).split())
        scored.append({"sentence1": first, "sentence2": f"{second} {number}", "score": float(same)})
    labelled = [{"text": f"{WORDS[n % 4]} {phrase(generator)} {n}", "label": WORDS[n % 4]} for n in range(160)]
    write_rows(folder / "pairs.jsonl.gz", pairs)
    write_rows(folder / "scored.jsonl.gz", scored)
    write_rows(folder / "labelled.jsonl.gz", labelled)
    write_rows(folder / "stsbenchmark/test.jsonl.gz", [{**row, "sentence1": f"{row['sentence1']} t"} for row in scored])
    write_rows(folder / "xquad-en/corpus.jsonl.gz", [{"_id": f"d{n}", "title": "", "text": row["positive"]}
                                                     for n, row in enumerate(pairs[:40])])  # fmt: skip
    write_rows(folder / "xquad-en/queries.test.jsonl.gz", [{"_id": f"q{n}", "text": row["query"]}
                                                           for n, row in enumerate(pairs[:40])])  # fmt: skip
    qrels = "".join(f"q{n}\td{n}\t1\n" for n in range(40))
    (folder / "xquad-en/qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.fixture(autouse=True)
def own_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that names the shared data would win over the recipe's folder."""
    monkeypatch.delenv("SCALEMERGE_DATA", raising=False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("tiny-data"))


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_data: Path, tiny_folders: Callable[[str], Path]) -> Callable[..., Path]:
    """`tiny_recipe(**changes)` writes a recipe and returns its path; changes are merged key by key ("a.b.c"=value)."""

    def make(**changes: Any) -> Path:
        recipe = copy.deepcopy(
            {
                "name": "tiny",
                "data": str(tiny_data),
                "base": {"path": str(tiny_folders("bert")), "max_length": 32},
                "tasks": {
                    "search": {"kind": "pairs", "sources": [{"path": "{data}/pairs.jsonl.gz"}]},
                    "sts": {"kind": "scored_pairs", "sources": [{"path": "{data}/scored.jsonl.gz"}]},
                    "topics": {"kind": "labelled_texts", "sources": [{"path": "{data}/labelled.jsonl.gz"}]},
                },
                "training": {"batch_size": 16, "max_steps": 6, "learning_rate": 1e-3, "checkpoint_every": 2},
                "joint": {"proportional": {"alpha": 1.0}},
                "probe": {"rows_per_task": 24, "validation_rows_per_task": 16},
                "positioning": {"steps": 8, "rows_per_step": 8, "validate_every": 2, "checkpoint_every": 2},
                "evaluation": {"suite": "shared", "tasks": ["stsbenchmark", "xquad-en"]},
            }
        )
        for path, value in changes.items():
            *parents, last = path.split(".")
            node: Any = recipe
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
            if value is None:
                node.pop(last, None)
            else:
                node[int(last) if isinstance(node, list) else last] = value
        path_of_recipe = tmp_path / "recipe.yaml"
        path_of_recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path_of_recipe

    return make


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("run", ...)`: the command line in a process of its own, one thread."""

    def run(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        prefix = list(launcher) or [sys.executable, "-m"]
        return subprocess.run(
            [*prefix, "scalemerge", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )

    return run
