"""Coefficients: which row of c a tensor uses, and that one assignment moves all layers."""

from __future__ import annotations

import pytest
import torch

from scalemerge.layers import Coefficients


def test_rows_and_gradients() -> None:
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    coefficients = Coefficients({"a": 0, "b": 1, "c": 1}, value)
    (coefficients.of("a")[0] + 10 * coefficients.of("b")[1] + 100 * coefficients.of("c")[1]).backward()
    assert torch.equal(value.grad, torch.tensor([[1.0, 0.0], [0.0, 110.0]]))
    coefficients.set(torch.zeros(2, 2))
    assert torch.equal(coefficients.of("b"), torch.zeros(2))


def test_uniform_is_one_row() -> None:
    coefficients = Coefficients.uniform(["a", "b"], torch.tensor([1.0, 2.0]))
    assert coefficients.value.shape == (1, 2) and torch.equal(coefficients.of("a"), coefficients.of("b"))


def test_a_flat_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[groups, experts\]"):
        Coefficients({"a": 0}, torch.ones(2))
