"""A synthetic run folder that looks like a real one: four experts, three joint baselines, four merges, five task types.

The numbers follow the shape of the paper's findings (experts win their own task, joint training pays for the small
tasks, the learned merge is slightly ahead); `write_run` is also how the page is looked at while it is designed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TASKS = [
    ("docs_search", "Retrieval", "ndcg_at_10"),
    ("code_search", "Retrieval", "ndcg_at_10"),
    ("cross_library_sts", "STS", "spearman"),
    ("sts_benchmark", "STS", "spearman"),
    ("topic_module", "Classification", "accuracy"),
    ("banking_intents", "Classification", "accuracy"),
    ("topic_clusters", "Clustering", "v_measure"),
    ("paraphrase_pairs", "Pair classification", "average_precision"),
]
EXPERTS = ["retrieval", "sts", "classification", "clustering"]
#                          retrieval   sts         classification clustering pairs
SCORES = {
    "base": [61.2, 48.9, 74.1, 79.0, 66.3, 71.4, 41.2, 77.5],
    "expert:retrieval": [72.4, 66.0, 72.0, 76.8, 67.0, 70.9, 42.6, 78.9],
    "expert:sts": [58.3, 47.1, 82.5, 85.6, 66.9, 72.0, 42.0, 84.3],
    "expert:classification": [57.6, 45.0, 73.2, 78.1, 79.5, 83.3, 50.4, 77.2],
    "expert:clustering": [60.0, 47.6, 72.8, 77.4, 75.7, 78.8, 54.9, 77.8],
    "joint:uniform": [68.0, 60.5, 80.3, 83.4, 74.6, 79.3, 49.3, 82.0],
    "joint:proportional": [71.6, 64.9, 79.4, 82.9, 74.1, 78.6, 48.8, 81.8],
    "joint:temperature_0.5": [69.9, 62.8, 79.9, 83.1, 74.5, 79.1, 49.0, 82.1],
    "merge:average": [66.4, 58.1, 79.2, 82.8, 74.0, 78.6, 49.8, 81.9],
    "merge:task_arithmetic": [68.8, 61.6, 80.0, 83.6, 75.0, 79.4, 50.5, 82.6],
    "merge:ties": [68.1, 60.7, 79.7, 83.3, 74.2, 78.9, 49.9, 82.3],
    "merge:self_positioning": [69.9, 63.4, 80.6, 84.0, 75.3, 80.0, 51.2, 83.1],
}
SECONDS = {
    "expert:retrieval": 412.0,
    "expert:sts": 128.0,
    "expert:classification": 96.0,
    "expert:clustering": 84.0,
    "joint:uniform": 731.0,
    "joint:proportional": 718.0,
    "joint:temperature_0.5": 726.0,
    "merge:average": 722.1,
    "merge:task_arithmetic": 725.0,
    "merge:ties": 729.4,
    "merge:self_positioning": 781.0,
}
GRAM = [[1.96, 0.21, 0.11, 0.13], [0.21, 1.04, 0.08, 0.07], [0.11, 0.08, 2.25, 0.83], [0.13, 0.07, 0.83, 0.64]]

WriteRun = Callable[..., Path]


def make_results(scores: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """results.json with `mean` and `by_type` as the design defines them."""
    models = {}
    for key, values in (scores or SCORES).items():
        named = {task[0]: value for task, value in zip(TASKS, values, strict=True)}
        by_type: dict[str, list[float]] = {}
        for (_, kind, _), value in zip(TASKS, values, strict=True):
            by_type.setdefault(kind, []).append(value)
        means = {kind: sum(group) / len(group) for kind, group in by_type.items()}
        models[key] = {
            "path": key.replace(":", "/"),
            "scores": named,
            "by_type": means,
            "mean": sum(means.values()) / len(means),
            "cost": _cost(key),
        }
    return {
        "schema": 1,
        "suite": {"name": "docs", "tasks": [{"name": n, "type": t, "metric": m} for n, t, m in TASKS]},
        "models": models,
        "environment": {
            "scalemerge": "0.1.0",
            "torch": "2.9.1",
            "device": "NVIDIA H100 80GB HBM3",
            "cpu_count": 16,
            "commit": "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
        },
    }


def write_run(folder: Path, *, groups: int = 1, steps: int = 1000, seed: int = 0) -> Path:
    """A finished run in `folder`; `groups` > 1 gives each transformer layer its own position."""
    rng = random.Random(seed)
    names = ["global"] if groups == 1 else [f"layers.{index}" for index in range(groups)]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", make_results())
    (folder / "recipe.yaml").write_text("name: docs\nbackbone: all-MiniLM-L6-v2\nexperts: [retrieval, sts]\n")
    history = [_search_step(step, steps, names, rng) for step in range(1, steps + 1)]
    position = {
        "method": "slerp",
        "granularity": "global" if groups == 1 else "layer",
        "experts": EXPERTS,
        "a": history[-1]["a"],
        "lambda": history[-1]["lambda"],
        "c": history[-1]["c"],
        "gram": GRAM if groups == 1 else {name: [[x / groups for x in row] for row in GRAM] for name in names},
        "order": EXPERTS,
        "order_effect": 0.013,
        "seed": seed,
        "steps": steps,
        "validation_loss": history[-1]["validation_loss"],
    }
    write_json(folder / "position" / "coefficients.json", position)
    write_lines(folder / "position" / "history.jsonl", history)
    for key in SCORES:
        kind, _, name = key.partition(":")
        if kind in ("expert", "joint"):
            start = {"retrieval": 2.6, "sts": 5.9, "classification": 3.1, "clustering": 2.2}.get(name, 3.4)
            lines = [_training_step(step, start, rng) for step in range(10, 1501, 10)]
            write_lines(folder / ("experts" if kind == "expert" else "joint") / name / "training.jsonl", lines)
    return folder


def write_json(path: Path, content: object) -> None:
    """Write JSON, making the folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a .jsonl file, making the folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _cost(key: str) -> dict[str, Any]:
    if key == "base":
        return {"seconds": 0, "examples": 0, "tokens": 0, "flops": 0, "peak_bytes": None, "device": "", "includes": []}
    spent = SECONDS[key]
    return {
        "seconds": spent,
        "examples": int(spent * 1600),
        "tokens": int(spent * 1.3e5),
        "flops": spent * 1.9e13,
        "peak_bytes": 11_400_000_000 if not key.startswith("merge") else 6_900_000_000,
        "device": "NVIDIA H100 80GB HBM3",
        "includes": [f"expert:{name}" for name in EXPERTS] if key.startswith("merge") else [],
    }


def _search_step(step: int, steps: int, names: list[str], rng: random.Random) -> dict[str, Any]:
    progress = 1 - math.exp(-4 * step / steps)
    start, end = [0.32, 0.32, 0.32, 0.32], [0.61, 0.47, 0.38, 0.21]
    losses = {
        name: first * (1 - gain * progress) + rng.gauss(0, 0.04 * first)
        for name, first, gain in zip(EXPERTS, [0.62, 2.9, 1.1, 0.8], [0.35, 0.2, 0.16, 0.09], strict=True)
    }
    coefficients = {
        name: [
            round(low + (high - low) * progress * (0.6 + 0.8 * (index + 1) / len(names) if len(names) > 1 else 1), 5)
            for low, high in zip(start, end, strict=True)
        ]
        for index, name in enumerate(names)
    }
    line = {
        "step": step,
        "loss": 1 - 0.22 * progress + rng.gauss(0, 0.02),
        "losses": losses,
        "a": [1.0, 0.9, 0.8, 0.5],
        "lambda": 0.9 + 0.25 * progress,
        "c": coefficients,
        "seconds": 0.058 * step,
    }
    if step % max(1, steps // 20) == 0:
        line["validation_loss"] = 1 - 0.2 * progress + rng.gauss(0, 0.003)
    return line


def _training_step(step: int, start: float, rng: random.Random) -> dict[str, Any]:
    loss = start * (0.35 + 0.65 * math.exp(-step / 320)) * (1 + rng.gauss(0, 0.06))
    return {"step": step, "loss": loss, "learning_rate": 2e-5 * (1 - step / 1500), "seconds": step * 0.2}


@pytest.fixture
def results_json() -> dict[str, Any]:
    """A fresh results.json content to bend."""
    return make_results()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run with a short search, so that a test renders in a moment."""
    return write_run(tmp_path / "docs-run", steps=120)
