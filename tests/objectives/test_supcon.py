"""The supervised contrastive loss against a naive loop in float64, and numerical gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from scalemerge.objectives.supcon import supcon


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive(text, label, temperature: float) -> float:
    per_anchor = []
    for a in range(len(text)):
        same = [p for p in range(len(text)) if p != a and label[p] == label[a]]
        if not same:
            continue
        logits = [float(text[a] @ text[j]) / temperature for j in range(len(text)) if j != a]
        log_denominator = math.log(sum(math.exp(x) for x in logits))
        terms = [float(text[a] @ text[p]) / temperature - log_denominator for p in same]
        per_anchor.append(-sum(terms) / len(terms))
    return sum(per_anchor) / len(per_anchor) if per_anchor else 0.0


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    temperature=st.floats(0.03, 1.0),
    seed=st.integers(0, 10**6),
)
@example(labels=[0], temperature=0.05, seed=0)
@example(labels=[0, 1, 2], temperature=0.05, seed=0)
def test_equals_a_naive_loop(labels, temperature, seed) -> None:
    """Labels that occur once, or none that occurs twice, included."""
    text = unit(len(labels), 6, seed=seed)
    ours = supcon(text, torch.tensor(labels), temperature=temperature)
    torch.testing.assert_close(ours.item(), naive(text, labels, temperature), rtol=1e-9, atol=1e-9)


def test_gradients() -> None:
    label = torch.tensor([0, 1, 0, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda x: supcon(x, label, temperature=0.3), (unit(6, 4, seed=1).requires_grad_(),))


def test_finite_gradients_where_no_label_occurs_twice() -> None:
    for rows in (1, 3):
        text = unit(rows, 4, seed=1).requires_grad_()
        supcon(text, torch.arange(rows)).backward()
        assert (text.grad == 0).all()


def test_large_label_numbers_are_kept_apart() -> None:
    """Labels are 63-bit fingerprints; two that agree in float32 must not be one label."""
    text = unit(4, 4, seed=3)
    big = 2**62
    assert supcon(text, torch.tensor([big, big, big + 1, big + 1])) == supcon(text, torch.tensor([0, 0, 1, 1]))
