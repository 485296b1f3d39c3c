"""Training in bfloat16 under DeepSpeed starts from the base's own float32 weights, not from rounded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero3"))]
)
def test_an_expert_that_learned_nothing_is_its_base(
    engine: str,
    tiny_recipe: Callable[..., Path],
    tiny_folders: Callable[[str], Path],
    tmp_path: Path,
    finish: Callable[..., Path],
) -> None:
    """Rounded masters would leave expert - base full of rounding: about 1/512 of each weight."""
    changes = {"training.precision": "bf16", "training.learning_rate": 1e-30, "training.max_steps": 2}
    trained = load_file(finish(tiny_recipe(**changes), tmp_path / "out", engine) / "model.safetensors")
    base = load_file(tiny_folders("bert") / "model.safetensors")
    assert trained.keys() <= base.keys()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in base.values()), "the base is no bfloat16"
    for name, value in trained.items():
        assert torch.equal(value, base[name]), name
