"""Four small tasks of all kinds with structure to learn, and recipes of them on a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalemerge.recipe import Recipe

WORDS = "apple river stone cloud engine paper window garden metal forest bridge candle".split()  # noqa: SIM905


def rows_of_all_kinds() -> dict[str, list[dict[str, Any]]]:
    """search and hard share queries; search has some queries twice; names has few texts a label."""
    made = random.Random(0)

    def phrase(length: int = 4) -> str:
        return " ".join(made.choice(WORDS) for _ in range(length))

    search = [{"query": f"{phrase()} {n % 110}", "positive": f"{phrase()} {n}"} for n in range(130)]
    search += [{"query": row["query"].upper(), "positive": f"again {n}"} for n, row in enumerate(search[:20])]
    hard = [
        {"query": row["query"], "positive": f"{n} {phrase()}", "negatives": [phrase() for _ in range(n % 3)]}
        for n, row in enumerate(search[:100])
    ]
    scored = []
    for number in range(120):
        first, same = phrase(), number % 5
        second = " ".join(first.split()[:same] + phrase(5 - same).split())
        scored.append({"sentence1": first, "sentence2": f"{second} {number}", "score": float(same)})
    names = [{"text": f"{phrase()} {n}", "label": f"l{n // 3}"} for n in range(120)]
    return {"search": search, "hard": hard, "scored": scored, "names": names}


KINDS = {"search": "pairs", "hard": "triplets", "scored": "scored_pairs", "names": "labelled_texts"}


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_folders: Callable[[str], Path]) -> Callable[..., Recipe]:
    """`make_recipe(["search"], streamed=False, **training)`: the recipe of some tasks."""

    def make(tasks: Any = tuple(KINDS), streamed: bool = False, seed: int = 0, **training: Any) -> Recipe:
        described = {}
        for name in tasks:
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_all_kinds()[name]))
            source = {"path": str(path)} | ({"streaming": True, "window": 60} if streamed else {})
            prompts = {"query": "find: "} if name in ("search", "hard") else {}
            described[name] = {"kind": KINDS[name], "sources": [source], "prompts": prompts}
        settings = {"batch_size": 8, "max_steps": 6, "learning_rate": 1e-3, "evaluate_every": 2, "evaluation_rows": 20}
        return Recipe(
            name="tiny",
            seed=seed,
            base={"path": str(tiny_folders("bert")), "max_length": 40},
            tasks=described,
            joint={"all": {"alpha": 0.0}},
            training=settings | {"checkpoint_every": 4} | training,
            probe={"rows_per_task": 4, "validation_rows_per_task": 4},
        )

    return make
