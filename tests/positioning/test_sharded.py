"""Positioning on several ranks against one: gradients of the coefficients, whole searches, whatever is sharded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS = Path(__file__).with_name("ranks.py")
ROOT = RANKS.parents[2]
MIXED = ["float32", "low_rank", "int8", "int4", "bfloat16"]
SETTINGS = {"rows_per_step": 13, "steps": 50, "learning_rate": 0.05, "validate_every": 5, "patience": 50}


@pytest.fixture(scope="session")
def models(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory, pairs: Any) -> dict[str, Any]:
    """Bases and five experts each, of sizes that no number of ranks divides, trained a few steps on different rows."""
    from scalemerge.encoder import Encoder
    from scalemerge.objectives.infonce import infonce

    found = {}
    for kind in ("bert", "qwen3"):
        root = tmp_path_factory.mktemp(f"sharded-{kind}")
        base = tiny_model(root / "base", kind)
        experts = {}
        for number in range(len(MIXED)):
            encoder = Encoder.load(base)
            trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-3)
            columns = pairs(100 + number, 96)["reverse" if number % 2 else "halves"]
            for start in range(0, 96, 12):
                query, positive = (
                    encoder([encoder.pad(encoder.tokenize(columns[role][start : start + 12]))])
                    for role in ("query", "positive")
                )
                optimizer.zero_grad()
                infonce(query, positive).backward()
                optimizer.step()
            encoder.save(root / f"e{number}")
            experts[f"e{number}"] = str(root / f"e{number}")
        found[kind] = {"base": str(base), "experts": experts}
        found[f"{kind}-stored"] = {"base": str(base), "experts": stored(base, experts, root)}
    return found


def stored(base: Path, experts: dict[str, str], root: Path) -> dict[str, str]:
    """The same experts as folders of all kinds: whole, int8, and int4, low-rank and bfloat16 with shared bases."""
    from scalemerge.task_vectors.compression import Compression, compress_folders

    folders = {name: Path(folder) for name, folder in experts.items()}
    found = {"e0": experts["e0"]}
    for form, names in (("int8", ["e1"]), ("int4", ["e2", "e3"]), ("svd", ["e4"])):
        how = Compression(form, 32, 3, len(names) > 1)  # type: ignore[arg-type]
        compress_folders(str(base), {name: folders[name] for name in names}, root / form, how)
        found |= {name: str(root / form / name) for name in names}
    return found


@pytest.fixture
def run_on(models: dict[str, Any], tmp_path: Path, pairs: Any) -> Callable[..., dict[str, Any]]:
    """`run_on(world, cases)`: what rank 0 found, by case."""

    def run(world: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
        folder = tmp_path / f"ranks-{world}"
        folder.mkdir(exist_ok=True)
        job = {"models": models, "cases": cases, "probe": pairs(20, 40), "validation": pairs(30, 20)}
        (folder / "job.json").write_text(json.dumps(job))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(port)]
        command = [*launcher, "--nproc-per-node", str(world), RANKS, folder / "job.json", folder / "out.pt"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
        first = ended.stderr.find("Traceback")
        assert ended.returncode == 0, ended.stderr[first : first + 4000]
        return torch.load(folder / "out.pt", weights_only=False)

    return run


@pytest.fixture(scope="module")
def one_rank_results() -> dict[str, Any]:
    return {}


@pytest.fixture
def one_rank(run_on: Any, one_rank_results: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """What a single process finds, each case once."""

    def find(cases: list[dict[str, Any]]) -> dict[str, Any]:
        new = [case for case in cases if case["name"] not in one_rank_results]
        if new:
            one_rank_results.update(run_on(1, new))
        return one_rank_results

    return find


def case(
    model: str, *, sharded: bool, kinds: list[str] = MIXED, do: str = "gradient", **settings: Any
) -> dict[str, Any]:
    chosen = {**SETTINGS, **settings}
    described = "-".join([model, do, "sharded" if sharded else "replicated", *kinds[:1], *map(str, settings.values())])
    return {"name": described, "model": model, "kinds": kinds, "sharded": sharded, "do": do, "settings": chosen}


GRADIENTS = [
    case(model, sharded=sharded, granularity=granularity, position=position)
    for model in ("bert", "qwen3")
    for sharded in (False, True)
    for granularity, position in (("global", "slerp"), ("layer", "linear"), ("module", "multislerp"))
]
GRADIENTS += [
    case(model, sharded=True, kinds=[kind] * len(MIXED), granularity="module", position="linear")
    for model in ("bert", "qwen3")
    for kind in sorted(set(MIXED))
]
GRADIENTS += [
    case(f"{model}-stored", sharded=sharded, kinds=[], granularity="layer", position="linear")
    for model in ("bert", "qwen3")
    for sharded in (False, True)
]
GRADIENTS += [
    case("qwen3", sharded=True, granularity="layer", position="linear", chunk_tokens=48),
    case("qwen3", sharded=True, granularity="layer", position="linear", recompute="all"),
    case("qwen3", sharded=True, granularity="layer", position="linear", length_groups=3),
]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gradients_are_those_of_one_rank(run_on: Any, one_rank: Any, world: int) -> None:
    cases = [*GRADIENTS]
    if world == 4:
        cases += [
            case(m, sharded=True, granularity="layer", position="linear", shard_ranks=2) for m in ("bert", "qwen3")
        ]
    found, wanted = run_on(world, cases), one_rank(cases)
    worst = {}
    for name, result in found.items():
        worst[name] = max(relative(result[part], wanted[name][part]) for part in ("gradient", "learned"))
        assert result["value"] == pytest.approx(wanted[name]["value"], rel=1e-6)
        assert result["validation"] == pytest.approx(wanted[name]["validation"], rel=1e-6)
    print(f"{world} ranks: worst {max(worst.values()):.1e} of {len(worst)} cases")
    assert not {name: error for name, error in worst.items() if error >= 1e-6}


SEARCHES = [
    case(model, sharded=sharded, kinds=["float32"] * len(MIXED), do="search", optimizer=optimizer, position=position)
    for model, sharded, optimizer, position in (
        ("bert", True, "adam", "slerp"),
        ("bert", False, "adam", "slerp"),
        ("qwen3", True, "adam", "multislerp"),
        ("qwen3", True, "lbfgs", "linear"),
    )
]


@pytest.mark.parametrize("world", [2, 4])
def test_searches_end_where_one_rank_does(run_on: Any, one_rank: Any, world: int) -> None:
    """Coefficients after 50 steps of Adam, or at the end of L-BFGS, within 1e-5."""
    found, wanted = run_on(world, SEARCHES), one_rank(SEARCHES)
    for name, result in found.items():
        one = wanted[name]
        assert (result["steps"], result["best_step"]) == (one["steps"], one["best_step"]), name
        difference = (torch.tensor(result["c"]["global"]) - torch.tensor(one["c"]["global"])).abs().max()
        print(f"{world} ranks, {name}: {float(difference):.1e} after {result['steps']} steps")
        assert difference < 1e-5, name
        moved = (torch.tensor(one["c"]["global"]) - 1 / len(MIXED)).abs().max()
        assert moved > 1e-2, "the search has moved the model at all"
