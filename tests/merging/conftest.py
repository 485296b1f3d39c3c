"""Fixtures of the merging tests: a tiny base with experts beside it, and the explicit merge that folders must hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def nudge(source: Path, target: Path, seed: int, scale: float) -> Path:
    """A copy of a model folder with seeded noise of `scale` times each tensor's root mean square on its weights."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().square().mean().sqrt()
            tensor = (tensor.float() + scale * noise).to(tensor.dtype)
        tensors[name] = tensor
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="session")
def nudged() -> Callable[..., Path]:
    return nudge


@pytest.fixture(scope="session")
def family(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A tiny BERT as a sentence-transformers folder, and three experts of it. Do not write into them."""
    from scalemerge.encoder import Encoder

    root = tmp_path_factory.mktemp("family")
    encoder = Encoder.load(tiny_model(root / "plain", "bert"))
    encoder.save(root / "base")
    return root / "base", {name: nudge(root / "base", root / name, i, 0.05) for i, name in enumerate(("a", "b", "c"))}


@pytest.fixture
def read() -> Callable[[Path], dict[str, Tensor]]:
    return lambda folder: load_file(folder / WEIGHTS)


@pytest.fixture
def explicit_merge() -> Callable[..., dict[str, Tensor]]:
    """W0 + sum c_i (W_i - W0) in float64 from the folders' weights; c by tensor name."""

    def merge(base: Path, experts: dict[str, Path], c: Callable[[str], list[float]]) -> dict[str, Tensor]:
        w0, tuned = load_file(base / WEIGHTS), [load_file(folder / WEIGHTS) for folder in experts.values()]
        return {
            name: w.double() + sum(x * (t[name].double() - w.double()) for x, t in zip(c(name), tuned, strict=True))
            for name, w in w0.items()
            if w.is_floating_point()
        }

    return merge
