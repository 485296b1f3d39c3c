"""Fixtures of the positioning tests: seeded task vectors, spherical interpolation written out on vectors, and a small
real problem (a tiny BERT and two experts trained from it)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def make_vectors(experts: int, size: int, seed: int = 0) -> Tensor:
    """Task vectors [E, n] float64 of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(experts, size, generator=generator, dtype=torch.float64)
    return vectors * (0.5 + torch.rand(experts, 1, generator=generator, dtype=torch.float64))


def literal_slerp(t: float, one: Tensor, two: Tensor) -> Tensor:
    """Spherical interpolation of two vectors as textbooks have it, the angle from chords (exact at all angles)."""
    u, v = one / one.norm(), two / two.norm()
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if angle == 0.0:
        return (1 - t) * one + t * two
    return math.sin((1 - t) * angle) / math.sin(angle) * one + math.sin(t * angle) / math.sin(angle) * two


def literal_position(a: list[float], vectors: Tensor) -> Tensor:
    """The paper's iterated interpolation on the task vectors themselves: the merged vector [n]."""
    merged = vectors[0]
    for i in range(1, len(a)):
        t = a[i] / (sum(a[:i]) / i + a[i])
        merged = literal_slerp(t, merged, vectors[i])
    return merged


@pytest.fixture(scope="session")
def vectors() -> Callable[..., Tensor]:
    return make_vectors


@pytest.fixture(scope="session")
def literal() -> Callable[[list[float], Tensor], Tensor]:
    return literal_position


# ---- a small real problem ------------------------------------------------------------------------------------------

WORDS = [
    "rain",
    "bread",
    "violin",
    "salt",
    "storm",
    "tune",
    "flour",
    "snow",
    "drum",
    "oven",
    "cloud",
    "choir",
    "butter",
    "hail",
    "opera",
    "onion",
]
EXPERTS = ("reverse", "halves")


def make_pairs(task: str, count: int, seed: int) -> dict[str, list[str]]:
    """Two tasks that pull apart: find the text with its words in reverse order; find the second half of a text."""
    generator = torch.Generator().manual_seed(seed)
    query, positive = [], []
    for number in range(count):
        words = [WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:4].tolist()]
        words[0] += str(number)
        query.append(" ".join(words if task == "reverse" else words[:2]))
        positive.append(" ".join(words[::-1] if task == "reverse" else words[2:]) + ("" if task == "reverse" else "!"))
    return {"query": query, "positive": positive}


@pytest.fixture(scope="session")
def pairs() -> Callable[[int, int], dict[str, dict[str, list[str]]]]:
    """`pairs(seed, count)`: columns of both tasks' rows."""
    return lambda seed, count: {task: make_pairs(task, count, seed + i) for i, task in enumerate(EXPERTS)}


def make_rows(task: str, count: int, seed: int) -> Any:
    from datasets import Dataset

    from scalemerge.data.tasks import TaskRows, fingerprint

    columns = make_pairs(task, count, seed)
    texts = [tuple(map(fingerprint, pair)) for pair in zip(columns["query"], columns["positive"], strict=True)]
    return TaskRows(task, "pairs", Dataset.from_dict(columns), [f"s0:{i}" for i in range(count)], texts)


@pytest.fixture(scope="session")
def problem(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """base and expert folders, tasks, probe and validation rows."""
    from scalemerge.encoder import Encoder
    from scalemerge.objectives.infonce import infonce
    from scalemerge.recipe import Source, Task

    root = tmp_path_factory.mktemp("problem")
    base = tiny_model(root / "base", "bert")
    experts: dict[str, Path] = {}
    for number, name in enumerate(EXPERTS):
        encoder = Encoder.load(base)
        trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        pairs = make_pairs(name, 256, seed=10 + number)
        for step in range(25):
            rows = slice(step * 16 % 256, step * 16 % 256 + 16)
            query, positive = (
                encoder([encoder.pad(encoder.tokenize(pairs[role][rows]))]) for role in ("query", "positive")
            )
            optimizer.zero_grad()
            infonce(query, positive).backward()
            optimizer.step()
        encoder.save(root / name)
        experts[name] = root / name
    return {
        "base": base,
        "experts": experts,
        "tasks": {name: Task(kind="pairs", sources=[Source(path="unused")]) for name in EXPERTS},
        "probe": {name: make_rows(name, 48, seed=20 + i) for i, name in enumerate(EXPERTS)},
        "validation": {name: make_rows(name, 24, seed=30 + i) for i, name in enumerate(EXPERTS)},
    }


@pytest.fixture
def make_search(problem: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """A search over a freshly built model, in tmp_path/<folder>, with short settings."""
    from scalemerge.encoder import Encoder
    from scalemerge.positioning import Search, build
    from scalemerge.recipe import Positioning
    from scalemerge.task_vectors import TaskVectorStore

    def make(folder: str = "position", *, seed: int = 0, key: str = "k", **settings: Any) -> Any:
        chosen = Positioning(**{
            "steps": 12, "rows_per_step": 12, "learning_rate": 0.1, "validate_every": 2, "patience": 50,
            "checkpoint_every": 3, "length_groups": 2, **settings,
        })  # fmt: skip
        store = TaskVectorStore(problem["base"], problem["experts"], chosen.task_vectors)
        model = build(Encoder.load(problem["base"]), store, chosen)
        return Search(
            model, problem["tasks"], problem["probe"], problem["validation"], chosen,
            seed=seed, folder=tmp_path / folder, key=key,
        )  # fmt: skip

    return make
