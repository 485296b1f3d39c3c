"""coefficient_grad: <dY' x, T_i> against the weight gradient written out in float64, and against finite differences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalemerge.kernels.coefficient_grad import (
    coefficient_grad_reference,
    embedding_coefficient_grad_reference,
    inner_products,
)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 9), n=st.integers(1, 9), k=st.integers(1, 9), experts=st.integers(1, 6),
    cuts=st.lists(st.floats(0, 1), max_size=3),
)  # fmt: skip
def test_sum_over_any_row_ranges_equals_the_formula(m: int, n: int, k: int, experts: int, cuts: list[float]) -> None:
    x, dy = numbers(m, k, seed=0), numbers(m, n, seed=1)
    vectors = [numbers(n, k, seed=2 + i) for i in range(experts)]
    expected = torch.stack([torch.einsum("mn,mk,nk->", dy, x, vector) for vector in vectors])
    bounds = sorted({0, n, *(round(cut * n) for cut in cuts)})
    total = sum(coefficient_grad_reference(x, dy, vectors, start, stop) for start, stop in pairwise(bounds))
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(coefficient_grad_reference(x, dy, vectors), expected, rtol=1e-11, atol=1e-11)


def test_is_the_derivative_by_central_differences() -> None:
    x, base = numbers(6, 5, seed=0), numbers(4, 5, seed=1)
    vectors = [numbers(4, 5, seed=2 + i) for i in range(3)]
    weights = numbers(6, 4, seed=9)

    def loss(c: torch.Tensor) -> torch.Tensor:
        merged = base + sum(value * vector for value, vector in zip(c, vectors, strict=True))
        return (torch.tanh(x @ merged.T) * weights).sum()

    c, step = torch.tensor([0.3, -0.2, 0.8], dtype=torch.float64), 1e-6
    y = x @ (base + sum(value * vector for value, vector in zip(c, vectors, strict=True))).T
    found = coefficient_grad_reference(x, weights * (1 - torch.tanh(y) ** 2), vectors)
    shifts = step * torch.eye(3, dtype=torch.float64)
    differences = torch.stack([(loss(c + shift) - loss(c - shift)) / (2 * step) for shift in shifts])
    torch.testing.assert_close(found, differences, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_embedding_equals_the_scattered_gradient(dtype: torch.dtype, tolerance: float) -> None:
    ids = torch.tensor([[3, 1, 3], [0, 3, 6]])  # a repeated row counts each time
    dy, vectors = numbers(2, 3, 5, seed=0, dtype=dtype), [numbers(7, 5, seed=1 + i, dtype=dtype) for i in range(3)]
    scattered = torch.zeros(7, 5, dtype=torch.float64).index_add_(0, ids.flatten(), dy.double().reshape(6, 5))
    expected = torch.stack([(scattered * vector.double()).sum() for vector in vectors])
    found = embedding_coefficient_grad_reference(ids, dy, vectors)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_summed_in_float32(gradient_dtype: torch.dtype) -> None:
    """A product of bfloat16 tensors summed in bfloat16 stops growing at 256 ones; T_i keeps its float32 digits."""
    ones = torch.ones(1000, 3, dtype=gradient_dtype)
    vector = torch.full((1000, 3), 1 + 2.0**-12)
    assert inner_products(ones, [vector]).item() == pytest.approx(3000 * (1 + 2.0**-12), rel=1e-6)


def test_float32_products_against_float64() -> None:
    x, dy = numbers(128, 64, seed=0, dtype=torch.float32), numbers(128, 96, seed=1, dtype=torch.float32)
    vectors = [numbers(96, 64, seed=2 + i, dtype=torch.float32) for i in range(4)]
    exact = coefficient_grad_reference(x.double(), dy.double(), [vector.double() for vector in vectors])
    scale = (dy.double().T @ x.double()).norm() * vectors[0].double().norm()
    assert ((coefficient_grad_reference(x, dy, vectors) - exact).abs() / scale).max() < 1e-6
