"""The multislerp position, against the formula on vectors that mergekit's multislerp is (measured, see FACTS)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scalemerge.positioning.multislerp import multislerp, multislerp_start


def on_vectors(w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(sum w_i |T_i|) normalize(sum w_i T_i / |T_i|), w summing to 1."""
    norms = rows.norm(dim=1)
    mean = (w / norms) @ rows
    return (w * norms).sum() * mean / mean.norm()


@given(a=st.lists(st.floats(0.02, 20), min_size=1, max_size=6), size=st.integers(2, 40), seed=st.integers(0, 10_000))
def test_equals_the_formula_on_vectors(vectors, a, size, seed) -> None:
    rows, a = vectors(len(a), size, seed), torch.tensor(a, dtype=torch.float64)
    w = a / a.sum()
    assume(((w / rows.norm(dim=1)) @ rows).norm() > 1e-3)
    expected = on_vectors(w, rows)
    found = multislerp(a.unsqueeze(0), (rows @ rows.T).unsqueeze(0))[0] @ rows
    assert (found - expected).norm() < 1e-9 * expected.norm()


@given(order=st.permutations(range(4)))
def test_there_is_no_order(vectors, order) -> None:
    rows, a = vectors(4, 20), torch.tensor([1.0, 0.2, 3.0, 0.7], dtype=torch.float64)
    here = multislerp(a.unsqueeze(0), (rows @ rows.T).unsqueeze(0))[0]
    there = multislerp(a[order].unsqueeze(0), (rows[order] @ rows[order].T).unsqueeze(0))[0]
    torch.testing.assert_close(there, here[order], rtol=1e-12, atol=1e-12)


@given(c=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), size=st.integers(2, 40), seed=st.integers(0, 10_000))
def test_start_solves_for_any_positive_coefficients(vectors, c, size, seed) -> None:
    rows, wanted = vectors(len(c), size, seed), torch.tensor([c], dtype=torch.float64)
    assume((wanted[0] @ rows).norm() > 1e-3)
    gram = (rows @ rows.T).unsqueeze(0)
    a, length = multislerp_start(wanted, gram)
    assert (a > 0).all() and (length > 0).all()
    torch.testing.assert_close(length.unsqueeze(-1) * multislerp(a, gram), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6])
def test_opposite_vectors_stay_finite(vectors, eps) -> None:
    rows = vectors(2, 20)
    rows[1] = -rows[0] + eps * rows[1]
    a = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    d = multislerp(a, (rows @ rows.T).unsqueeze(0))
    (gradient,) = torch.autograd.grad(d.sum(), a)
    assert torch.isfinite(d).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("zero", [[0], [1, 2], [0, 1, 2]])
def test_zero_task_vectors_get_no_weight(vectors, zero) -> None:
    rows = vectors(3, 20)
    rows[zero] = 0.0
    gram = (rows @ rows.T).unsqueeze(0)
    a = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    d = multislerp(a, gram)
    (gradient,) = torch.autograd.grad(d.sum(), a)
    assert torch.isfinite(gradient).all() and (d[0, zero] == 0).all()
    start, length = multislerp_start(torch.full((1, 3), 1 / 3, dtype=torch.float64), gram)
    assert torch.isfinite(start).all() and torch.isfinite(length).all()
    kept = [i for i in range(3) if i not in zero]
    torch.testing.assert_close(
        (length * multislerp(start, gram))[0, kept], torch.full((len(kept),), 1 / 3, dtype=torch.float64)
    )
