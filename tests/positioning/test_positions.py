"""Position: the learned numbers, where they start, in which order, and what float32 keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scalemerge.errors import InputError
from scalemerge.positioning import POSITIONS, Position
from scalemerge.positioning.positions import inverse_softplus


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    return (rows @ rows.T).unsqueeze(0)


@st.composite
def starts(draw):
    c = draw(st.lists(st.floats(0.01, 5), min_size=1, max_size=6))
    return c, draw(st.permutations(range(len(c)))), draw(st.integers(0, 10_000))


@pytest.mark.parametrize("kind", POSITIONS)
@given(start=starts())
def test_starts_exactly_at_any_positive_coefficients_in_any_order(vectors, kind, start) -> None:
    c, order, seed = start
    rows, wanted = vectors(len(c), 12, seed), torch.tensor([c], dtype=torch.float64)
    for i in range(1, len(c)):
        so_far = wanted[0, order[:i]] @ rows[order[:i]]
        assume(torch.dot(so_far, rows[order[i]]) > -0.99 * so_far.norm() * rows[order[i]].norm())
    position = Position(kind, gram_of(rows), order=order, start=c, dtype=torch.float64)
    torch.testing.assert_close(position(), wanted, rtol=1e-9, atol=0)
    single = Position(kind, gram_of(rows), order=order, start=c)
    assert single().dtype == torch.float32
    torch.testing.assert_close(single().double(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", POSITIONS)
def test_equal_shares_by_default_in_every_group(vectors, kind) -> None:
    grams = torch.cat([gram_of(vectors(4, 20, seed)) for seed in range(3)])
    torch.testing.assert_close(Position(kind, grams)(), torch.full((3, 4), 0.25), rtol=1e-6, atol=0)


@given(order=st.permutations(range(4)))
def test_order_is_the_order_of_visits_and_not_of_results(vectors, literal, order) -> None:
    """The merged vector of shares a visited in `order`, whatever the order of the columns."""
    rows = vectors(4, 20)
    position = Position("slerp", gram_of(rows), order=order, dtype=torch.float64)
    a = [0.5, 2.0, 1.0, 0.7]  # in the experts' own order
    with torch.no_grad():
        position.raw_a.copy_(inverse_softplus(torch.tensor([[a[i] for i in order]], dtype=torch.float64)))
        position.raw_lambda.copy_(inverse_softplus(torch.tensor([0.8], dtype=torch.float64)))
    torch.testing.assert_close(position.a[0], torch.tensor(a, dtype=torch.float64))
    expected = 0.8 * literal([a[i] for i in order], rows[order])
    torch.testing.assert_close(position()[0] @ rows, expected, rtol=1e-10, atol=1e-10)


def test_order_effect_against_the_vectors(vectors, literal) -> None:
    rows, a = vectors(4, 20), [0.5, 2.0, 1.0, 0.7]
    position = Position("slerp", gram_of(rows), dtype=torch.float64)
    with torch.no_grad():
        position.raw_a.copy_(inverse_softplus(torch.tensor([a], dtype=torch.float64)))
    here, there = literal(a, rows), literal(a[::-1], rows.flip(0))
    assert position.order_effect() == pytest.approx(float((here - there).norm() / here.norm()), rel=1e-10)
    assert position.order_effect() > 0.01


@pytest.mark.parametrize(
    "kind, experts", [("slerp", 1), ("slerp", 2), ("multislerp", 2), ("multislerp", 4), ("linear", 4)]
)
def test_no_order_effect_where_there_is_no_order(vectors, kind, experts) -> None:
    """Two vectors meet at the same point of the arc from either end."""
    start = [0.2, 0.5, 0.9, 0.1][:experts]
    position = Position(kind, gram_of(vectors(experts, 20)), start=start, dtype=torch.float64)
    assert position.order_effect() == pytest.approx(0.0, abs=1e-14)


def test_order_effect_of_zero_vectors_is_a_number() -> None:
    assert Position("slerp", torch.zeros(1, 3, 3)).order_effect() == 0.0


def test_linear_length_and_direction() -> None:
    position = Position("linear", torch.eye(2).unsqueeze(0), start=[3.0, -4.0])
    assert torch.equal(position(), torch.tensor([[3.0, -4.0]]))
    torch.testing.assert_close(position.length, torch.tensor([5.0], dtype=torch.float64))
    torch.testing.assert_close(position.a, torch.tensor([[0.6, -0.8]], dtype=torch.float64))


def test_linear_length_has_a_finite_gradient_at_zero() -> None:
    position = Position("linear", torch.eye(2).unsqueeze(0), start=[0.0, 0.0])
    position.length.sum().backward()
    assert torch.isfinite(position.raw_c.grad).all()


@pytest.mark.parametrize("kind", POSITIONS)
def test_learned_numbers_are_float32_and_steps_of_1e_4_survive(vectors, kind) -> None:
    position = Position(kind, gram_of(vectors(3, 20)), start=[1.0, 1.5, 0.7])
    in_bfloat16 = copy.deepcopy(position).bfloat16()
    for each in (position, in_bfloat16):
        assert [parameter.numel() for parameter in each.parameters()] == ([3] if kind == "linear" else [3, 1])
        before = [parameter.detach().clone() for parameter in each.parameters()]
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-4)
        for _ in range(10):
            for parameter in each.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moves = torch.cat([(old - new).flatten() for old, new in zip(before, each.parameters(), strict=True)])
        if each is position:
            assert moves.dtype == torch.float32
            torch.testing.assert_close(moves.detach(), torch.full_like(moves, 1e-3), rtol=1e-3, atol=0)
        else:
            assert (moves.abs() < 0.5e-3).any()  # the reason for float32


@given(value=st.floats(1e-30, 1e3))
def test_inverse_softplus(value) -> None:
    raw = inverse_softplus(torch.tensor(value, dtype=torch.float64))
    assert torch.nn.functional.softplus(raw).item() == pytest.approx(value, rel=1e-9)


def test_bad_settings_are_one_line_errors() -> None:
    gram = torch.eye(3).unsqueeze(0)
    for settings, words in [
        ({"kind": "ties"}, "'ties' is not one of slerp, multislerp, linear"),
        ({"kind": "slerp", "order": [0, 1, 1]}, "positioning.order"),
        ({"kind": "slerp", "order": [0, 1]}, "positioning.order"),
        ({"kind": "slerp", "start": [0.3, -0.1, 0.2]}, "positive"),
        ({"kind": "multislerp", "start": [0.3, 0.0, 0.2]}, "positive"),
        ({"kind": "linear", "start": [0.3, float("nan"), 0.2]}, "positioning.start"),
    ]:
        with pytest.raises(InputError, match=words):
            Position(settings.pop("kind"), gram, **settings)
