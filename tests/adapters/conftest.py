"""Experts and adapters on tiny bases, with random numbers in place of training."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def tuned(base: Path, folder: Path, seed: int = 0, size: float = 0.02) -> Path:
    """A copy of a model with every floating-point tensor moved."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    for value in weights.values():
        if value.is_floating_point():
            value += size * torch.randn(value.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
