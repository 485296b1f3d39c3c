"""The slerp position in Gram coordinates, against spherical interpolation on the vectors themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scalemerge.positioning.slerp import sine_ratio, slerp, slerp_start

SHARES = st.floats(0.02, 20)


def merged(a: list[float], vectors: torch.Tensor) -> torch.Tensor:
    direction = slerp(torch.tensor([a], dtype=torch.float64), (vectors @ vectors.T).unsqueeze(0))
    return direction[0] @ vectors


@given(a=st.lists(SHARES, min_size=1, max_size=6), size=st.integers(2, 40), seed=st.integers(0, 10_000))
def test_equals_interpolation_of_the_vectors(vectors, literal, a, size, seed) -> None:
    rows = vectors(len(a), size, seed)
    for i in range(1, len(a)):  # beside exactly opposite vectors every formula loses digits
        so_far = literal(a[:i], rows)
        assume(torch.dot(so_far, rows[i]) > -0.99 * so_far.norm() * rows[i].norm())
    expected = literal(a, rows)
    assert (merged(a, rows) - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-5, 1e-3, 0.1])
def test_nearly_parallel_vectors(vectors, literal, eps) -> None:
    rows = vectors(4, 50)
    rows[1:] = rows[:1] * torch.tensor([[1.3], [0.4], [2.0]], dtype=torch.float64) + eps * rows[1:]
    a = [1.0, 0.3, 2.0, 0.7]
    expected = literal(a, rows)
    assert (merged(a, rows) - expected).norm() < 1e-10 * expected.norm()


def test_equals_mergekit_for_two(vectors) -> None:
    """mergekit's slerp (v0, v1, t): angle by arccos of unit vectors, weights on the vectors as they are."""
    one, two = vectors(2, 30)
    for t in (0.1, 0.5, 0.85):
        theta = torch.arccos((one / one.norm() * (two / two.norm())).sum())
        s0 = torch.sin((1 - t) * theta) / torch.sin(theta)
        s1 = torch.sin(t * theta) / torch.sin(theta)
        found = merged([1 - t, t], torch.stack([one, two]))
        torch.testing.assert_close(found, s0 * one + s1 * two, rtol=1e-12, atol=1e-12)


def test_four_equal_shares(vectors, literal) -> None:
    """The design's example: norms 1.4, 1.0, 1.5, 0.8; 45 degrees at each step where the vectors are orthogonal, and
    (0.32, 0.32, 0.49, 0.70) where the first two have the cosine measured between two real experts."""
    norms = torch.tensor([1.4, 1.0, 1.5, 0.8], dtype=torch.float64)
    orthogonal = torch.diag(norms)
    d = slerp(torch.ones(1, 4, dtype=torch.float64), (orthogonal @ orthogonal.T).unsqueeze(0))[0]
    expected = torch.tensor([0.125**0.5, 0.125**0.5, 0.5, 0.5**0.5], dtype=torch.float64)
    torch.testing.assert_close(d, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d @ orthogonal, literal([1.0] * 4, orthogonal), rtol=1e-12, atol=1e-12)
    tilted = torch.eye(4, dtype=torch.float64)
    tilted[1, :2] = torch.tensor([0.18, math.sqrt(1 - 0.18**2)])
    tilted = tilted * norms.unsqueeze(1)
    d = slerp(torch.ones(1, 4, dtype=torch.float64), (tilted @ tilted.T).unsqueeze(0))[0]
    torch.testing.assert_close(d, torch.tensor([0.32, 0.32, 0.49, 0.70], dtype=torch.float64), rtol=0, atol=0.015)
    torch.testing.assert_close(d @ tilted, literal([1.0] * 4, tilted), rtol=1e-12, atol=1e-12)


def test_groups_are_independent(vectors) -> None:
    rows = [vectors(3, 20, seed) for seed in range(3)]
    grams = torch.stack([each @ each.T for each in rows])
    a = torch.tensor([[1, 2, 3], [0.5, 0.1, 2], [1, 1, 1]], dtype=torch.float64)
    together = slerp(a, grams)
    for number in range(3):
        torch.testing.assert_close(together[number], slerp(a[number : number + 1], grams[number : number + 1])[0])


@given(t=st.floats(0, 1), angle=st.floats(1e-12, 3.1))
def test_sine_ratio(t, angle) -> None:
    """Against sin(tW)/sin W where its rounding is known, through both branches and over their border."""
    found = sine_ratio(torch.tensor(t, dtype=torch.float64), torch.tensor(math.cos(angle), dtype=torch.float64)).item()
    exact_angle = math.acos(math.cos(angle)) if angle > 0.1 else angle
    expected = math.sin(t * exact_angle) / math.sin(exact_angle)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("cosine", [1.0, 1.0 + 2e-16, 1 - 1e-16, 1 - 1e-9, 0.98, 0.979999, 0.0, -0.5, -0.9])
def test_sine_ratio_derivatives(cosine) -> None:
    t = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    x = torch.full((4,), cosine, dtype=torch.float64, requires_grad=True)
    value = sine_ratio(t, x)
    dt, dx = torch.autograd.grad(value.sum(), (t, x))
    z = (1 - cosine) / 2
    if z < 1e-8:  # first terms of t (1 + (1 - t^2) z / 1.5 + ...)
        torch.testing.assert_close(dt, torch.ones_like(dt), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(dx, -t.detach() * (1 - t.detach() ** 2) / 3, rtol=1e-7, atol=1e-7)
    else:
        angle = math.acos(cosine)
        sin, cos = torch.sin(t.detach() * angle), torch.cos(t.detach() * angle)
        torch.testing.assert_close(dt, cos * angle / math.sin(angle), rtol=1e-9, atol=1e-9)
        by_angle = (t.detach() * cos * math.sin(angle) - sin * math.cos(angle)) / math.sin(angle) ** 2
        torch.testing.assert_close(dx, by_angle / -math.sin(angle), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 1e-3])
def test_nearly_opposite_vectors_stay_finite(vectors, eps) -> None:
    rows = vectors(3, 20)
    rows[1] = -0.7 * rows[0] + eps * rows[1]
    a = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    d = slerp(a, (rows @ rows.T).unsqueeze(0))
    (gradient,) = torch.autograd.grad(d.square().sum(), a)
    assert torch.isfinite(d).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("zero", [[0], [1], [2], [0, 1], [0, 1, 2]])
def test_zero_task_vectors_stay_finite(vectors, zero) -> None:
    rows = vectors(3, 20)
    rows[zero] = 0.0
    a = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    d = slerp(a, (rows @ rows.T).unsqueeze(0))
    (gradient,) = torch.autograd.grad(d.square().sum(), a)
    assert torch.isfinite(d).all() and torch.isfinite(gradient).all() and gradient.abs().max() > 0


@given(c=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), size=st.integers(2, 40), seed=st.integers(0, 10_000))
def test_start_solves_for_any_positive_coefficients(vectors, c, size, seed) -> None:
    rows = vectors(len(c), size, seed)
    for i in range(1, len(c)):
        so_far = torch.tensor(c[:i], dtype=torch.float64) @ rows[:i]
        assume(torch.dot(so_far, rows[i]) > -0.99 * so_far.norm() * rows[i].norm())
    gram, wanted = (rows @ rows.T).unsqueeze(0), torch.tensor([c], dtype=torch.float64)
    a, length = slerp_start(wanted, gram)
    assert (a > 0).all() and (length > 0).all()
    torch.testing.assert_close(length.unsqueeze(-1) * slerp(a, gram), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-3])
def test_start_among_nearly_parallel_vectors(vectors, eps) -> None:
    rows = vectors(4, 50)
    rows[1:] = rows[:1] * torch.tensor([[1.3], [0.4], [2.0]], dtype=torch.float64) + eps * rows[1:]
    gram, wanted = (rows @ rows.T).unsqueeze(0), torch.tensor([[0.3, 0.1, 0.5, 0.2]], dtype=torch.float64)
    a, length = slerp_start(wanted, gram)
    torch.testing.assert_close(length.unsqueeze(-1) * slerp(a, gram), wanted, rtol=1e-10, atol=0)
