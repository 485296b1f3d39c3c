"""Matryoshka: a loss at several lengths of the same embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scalemerge.errors import InputError
from scalemerge.objectives import compute_loss, shortened
from scalemerge.recipe import Loss


def embeddings(seed: int, rows: int = 6, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1).requires_grad_()


def test_the_full_length_alone_is_the_loss_itself() -> None:
    roles = {"query": embeddings(0), "positive": embeddings(1)}
    plain = compute_loss("infonce", roles, {}, {})
    assert torch.equal(compute_loss("infonce", roles, {}, {}, [(12, 3.0)]), plain)


@pytest.mark.parametrize("name", ["infonce", "cosent", "supcon"])
def test_the_weighted_mean_over_normalized_beginnings(name: str) -> None:
    targets = {}
    roles = {"query": embeddings(0), "positive": embeddings(1), "negatives": embeddings(2, rows=9)}
    if name == "cosent":
        roles, targets = {"sentence1": embeddings(0), "sentence2": embeddings(1)}, {"score": torch.arange(6) % 3 * 1.0}
    elif name == "supcon":
        roles, targets = {"text": embeddings(0)}, {"label": torch.arange(6) % 2}
    found = compute_loss(name, roles, targets, {}, [(12, 1.0), (5, 2.0), (3, 0.5)])
    expected = torch.zeros((), dtype=torch.float64)
    for dimension, weight in ((12, 1.0), (5, 2.0), (3, 0.5)):
        cut = dict(roles)
        if dimension < 12:
            begun = {role: rows[:, :dimension] for role, rows in roles.items()}
            cut = {role: rows / rows.norm(dim=1, keepdim=True) for role, rows in begun.items()}
        expected = expected + weight * compute_loss(name, cut, targets, {}) / 3.5
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(found, list(roles.values()))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(roles.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_agrees_with_sentence_transformers() -> None:
    """MatryoshkaLoss over MultipleNegativesRankingLoss (which adds the lengths' losses up; ours is their mean)."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query, positive = embeddings(0).float(), embeddings(1).float()

    class Model(torch.nn.Module):
        def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"sentence_embedding": features["rows"]}

        def get_embedding_dimension(self) -> int:
            return 12

    model = Model()
    inner = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    theirs = losses.MatryoshkaLoss(model, inner, [12, 6, 3], matryoshka_weights=[1, 1, 1])
    expected = theirs([{"rows": query}, {"rows": positive}], torch.arange(6)) / 3
    roles = {"query": query, "positive": positive}
    found = compute_loss("infonce", roles, {}, {"temperature": 0.05}, [(12, 1.0), (6, 1.0), (3, 1.0)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bad_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="dimension 13 is more than the embeddings' 12"):
        shortened(embeddings(0), 13)
    for bad in ({"matryoshka": [8, 8]}, {"matryoshka": [0]}, {"matryoshka": [8], "matryoshka_weights": [1.0, 2.0]},
                {"matryoshka_weights": [1.0]}, {"matryoshka": [8], "matryoshka_weights": [0.0]}):  # fmt: skip
        with pytest.raises(ValueError, match="matryoshka"):
            Loss(name="infonce", **bad)
