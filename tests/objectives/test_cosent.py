"""CoSENT against sentence-transformers, its ranking property, and numerical gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.objectives.cosent import cosent


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    scores=st.lists(st.integers(0, 4), min_size=1, max_size=10),
    scale=st.sampled_from([1.0, 20.0, 50.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_sentence_transformers(scores, scale, seed) -> None:
    """Ties and equal scores included."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    first, second = normal(len(scores), 6, seed=seed), normal(len(scores), 6, seed=seed + 1)
    score = torch.tensor(scores, dtype=torch.float64)
    expected = losses.CoSENTLoss(torch.nn.Identity(), scale=scale).compute_loss_from_embeddings([first, second], score)
    torch.testing.assert_close(cosent(first, second, score, scale=scale), expected, rtol=1e-9, atol=1e-9)


@given(shift=st.floats(-10, 10), factor=st.floats(0.1, 10), seed=st.integers(0, 10**6))
def test_only_the_order_of_scores_matters(shift, factor, seed) -> None:
    first, second = normal(6, 5, seed=seed), normal(6, 5, seed=seed + 1)
    score = torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close(cosent(first, second, score * factor + shift), cosent(first, second, score))


def test_the_right_order_costs_less_than_the_reverse() -> None:
    first = torch.eye(3, dtype=torch.float64)
    second = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.float64)  # cosines 1, 0.71, 0
    right = cosent(first, second, torch.tensor([2.0, 1.0, 0.0]))
    reverse = cosent(first, second, torch.tensor([0.0, 1.0, 2.0]))
    assert right < 0.01 < 10 < reverse


def test_equal_scores_cost_nothing_and_have_finite_gradients() -> None:
    first, second = normal(4, 5, seed=0).requires_grad_(), normal(4, 5, seed=1)
    loss = cosent(first, second, torch.ones(4))
    loss.backward()
    assert loss.item() == 0
    assert (first.grad == 0).all()


def test_gradients() -> None:
    score = torch.tensor([0.0, 1.0, 1.0, 3.0, 2.0])
    inputs = (normal(5, 4, seed=2).requires_grad_(), normal(5, 4, seed=3).requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: cosent(a, b, score, scale=3.0), inputs)
