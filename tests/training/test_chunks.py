"""chunk_tokens: auto: doubling while it pays, stopping at the batch and at memory, leaving nothing behind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from scalemerge.training import chunks


class _Engine:
    """An engine of one rank; backward works as the real one's."""

    world, rank, device = 1, 0, torch.device("cpu")

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.lasts: list[bool] = []

    def backward(self, make_loss: Any, last: bool) -> None:
        self.lasts.append(last)
        with nullcontext():
            make_loss().backward()

    def sum(self, *values: float) -> list[float]:
        return list(values)


def texts(count: int, length: int = 64) -> list[dict[str, list[int]]]:
    return [{"input_ids": [1] * length} for _ in range(count)]


@pytest.mark.parametrize(
    ("fastest", "count", "expected"),
    [(4096, 1000, 4096), (1024, 1000, 1024), (10**9, 1000, chunks.LARGEST_ON_CPU), (10**9, 40, 4096)],
)
def test_grows_while_it_pays(monkeypatch: pytest.MonkeyPatch, fastest: int, count: int, expected: int) -> None:
    """Tokens a second rise until `fastest` tokens and fall after; 40 texts of 64 tokens are 2,560 in all."""

    def measure(engine: Any, embed: Any, rows: list[Any]) -> tuple[float, int]:
        used = sum(len(row["input_ids"]) for row in rows)
        return (1.0 if used <= fastest else used / fastest * 1.5), 0

    monkeypatch.setattr(chunks, "_measure", measure)
    assert chunks.find_chunk_tokens(_Engine(), lambda rows: torch.zeros(1), texts(count)) == expected


def test_stops_before_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_measure", lambda engine, embed, rows: (1.0, len(rows) * 64))
    monkeypatch.setattr(chunks, "_fits_twice", lambda engine, grown: grown < 2048)
    assert chunks.find_chunk_tokens(_Engine(), lambda rows: torch.zeros(1), texts(1000)) == 2048


def test_leaves_no_gradient_and_never_completes_a_step() -> None:
    engine = _Engine()

    def embed(rows: list[Any]) -> torch.Tensor:
        return engine.weight * len(rows)

    chunks.find_chunk_tokens(engine, embed, texts(30))
    assert engine.weight.grad is not None and not engine.weight.grad.any()
    assert engine.lasts and not any(engine.lasts)
