"""InfoNCE against sentence-transformers, a naive loop, and numerical gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.objectives.infonce import infonce


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive(query, positive, negatives, temperature, margin, symmetric=False):
    """The formula, one pair at a time."""

    def direction(anchors, documents):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(anchors)):
            own = float(anchors[i] @ documents[i])
            denominator = 0.0
            for j in range(len(documents)):
                s = float(anchors[i] @ documents[j])
                if margin is not None and j != i and s > own + margin:
                    continue
                denominator += torch.exp(torch.tensor(s / temperature, dtype=torch.float64))
            total += torch.log(denominator) - own / temperature
        return total / len(anchors)

    loss = direction(query, torch.cat([positive, negatives]))
    return (loss + direction(positive, query)) / 2 if symmetric else loss


@pytest.mark.parametrize("hard", [0, 1, 3], ids="negatives={}".format)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.05, 1.0])
def test_equals_sentence_transformers(hard: int, symmetric: bool, temperature: float) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query, positive = unit(9, 16, seed=1), unit(9, 16, seed=2)
    negatives = [unit(9, 16, seed=3 + number) for number in range(hard)]
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=1 / temperature, directions=directions, partition_mode="per_direction"
    )
    expected = theirs.compute_loss_from_embeddings([query, positive, *negatives], torch.zeros(9))
    given_negatives = torch.cat(negatives) if hard else None
    ours = infonce(query, positive, given_negatives, temperature=temperature, symmetric=symmetric)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@given(
    rows=st.integers(1, 8),
    hard=st.integers(0, 9),
    temperature=st.floats(0.02, 2.0),
    margin=st.none() | st.floats(-0.5, 0.5),
    symmetric=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_a_naive_loop(rows, hard, temperature, margin, symmetric, seed) -> None:
    """Any number of hard negatives, any margin; a margin never masks the positive itself."""
    query, positive, negatives = unit(rows, 6, seed=seed), unit(rows, 6, seed=seed + 1), unit(hard, 6, seed=seed + 2)
    ours = infonce(query, positive, negatives, temperature=temperature, margin=margin, symmetric=symmetric)
    expected = naive(query, positive, negatives, temperature, margin, symmetric)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_margin_leaves_out_a_false_negative() -> None:
    """A copy of the query among the hard negatives dominates the loss; with a margin it has no weight at all."""
    query, positive, others = unit(4, 8, seed=1), unit(4, 8, seed=2), unit(3, 8, seed=3)
    with_copy = torch.cat([others, query[:1]])
    clean = infonce(query[:1], positive[:1], others, margin=0.1)
    assert infonce(query[:1], positive[:1], with_copy) > infonce(query[:1], positive[:1], others) + 1
    torch.testing.assert_close(infonce(query[:1], positive[:1], with_copy, margin=0.1), clean, rtol=1e-12, atol=1e-12)


def test_no_gradient_through_what_the_margin_leaves_out() -> None:
    query, positive = unit(1, 8, seed=1), unit(1, 8, seed=2)
    negatives = torch.cat([query, unit(20, 8, seed=4)]).requires_grad_()
    infonce(query, positive, negatives, margin=0.0).backward()
    masked = (negatives @ query[0] > (query @ positive.T).item()).detach()
    assert masked[0] and not masked.all()
    assert (negatives.grad[masked] == 0).all()
    assert (negatives.grad[~masked] != 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("margin", [None, 0.1])
def test_gradients(symmetric: bool, margin: float | None) -> None:
    inputs = tuple(unit(rows, 5, seed=rows).requires_grad_() for rows in (4, 4, 3))
    assert torch.autograd.gradcheck(
        lambda q, p, n: infonce(q, p, n, temperature=0.3, margin=margin, symmetric=symmetric), inputs
    )


def test_empty_negatives_are_none() -> None:
    query, positive = unit(4, 8, seed=1), unit(4, 8, seed=2)
    torch.testing.assert_close(infonce(query, positive, positive[:0]), infonce(query, positive), rtol=0, atol=0)
