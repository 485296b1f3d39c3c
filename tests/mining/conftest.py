"""An encoder whose embeddings are told or random by text, that counts what it encodes and can be killed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalemerge.data.sources import load_rows
from scalemerge.recipe import Source


class FakeEncoder:
    """Vectors by text from `told`, otherwise random, seeded by prompt and text. Dies after `lives` calls."""

    def __init__(self, told: dict[str, Sequence[float]] | None = None, lives: int = 10**9, dimension: int = 16) -> None:
        self.told, self.lives, self.dimension = told or {}, lives, dimension
        self.prompts: dict[str, str] = {}
        self.device = torch.device("cpu")
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str], *, batch_size: int = 64, prompt: str = "") -> Tensor:
        if not self.lives:
            raise KeyboardInterrupt
        self.lives -= 1
        self.encoded += [prompt + text for text in texts]
        return torch.stack([self.vector(prompt + text) for text in texts])

    def vector(self, text: str) -> Tensor:
        if text in self.told:
            return torch.tensor(self.told[text], dtype=torch.float32)
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        return torch.randn(self.dimension, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fake() -> type[FakeEncoder]:
    return FakeEncoder


@pytest.fixture
def mined() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a written file, as training would read them."""

    def read(path: Path) -> list[dict[str, Any]]:
        rows = load_rows(Source(path=str(path)), "triplets")
        return [dict(row) for row in rows]

    return read
