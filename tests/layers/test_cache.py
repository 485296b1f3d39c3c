"""cache=True: the same numbers, each weight merged once while the coefficients stand still."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalemerge.layers import Coefficients, LowRank, MergedConv1D, MergedLinear, MergeSettings
from scalemerge.layers import linear as linear_module

IN, OUT = 40, 24


def make_layer(numbers, kind="linear", extra=(), **settings):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    module = (nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)).double()
    shape = module.weight.shape
    vectors = {
        "weight": [numbers(*shape, seed=i) for i in range(2)]
        + [LowRank(numbers(2, shape[1], seed=8), numbers(shape[0], 2, seed=9))],
        "bias": [numbers(OUT, seed=5 + i) for i in range(3)],
    }
    value = torch.tensor([[0.4, -0.7, 0.2]], dtype=torch.float64, requires_grad=True)
    coefficients = Coefficients({"l.weight": 0, "l.bias": 0}, value)
    return (MergedLinear if kind == "linear" else MergedConv1D)(
        module, vectors, coefficients, "l", MergeSettings(**settings)
    )


@pytest.fixture
def merges(monkeypatch) -> list[int]:
    """One entry for each time that a weight is merged whole into a cache."""
    made: list[int] = []
    real = linear_module.merge_weights
    monkeypatch.setattr(linear_module, "merge_weights", lambda *args: made.append(1) or real(*args))
    return made


def results(layer, x):
    y = layer(x)
    return (y, *torch.autograd.grad(y.sin().sum(), (x, layer.coefficients.value)))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_same_numbers(numbers, relative_error, merges, kind) -> None:
    x = numbers(5, IN, seed=7).requires_grad_()
    expected = results(make_layer(numbers, kind, chunk_bytes=1), x)
    assert not merges
    for found, wanted in zip(results(make_layer(numbers, kind, cache=True), x), expected, strict=True):
        assert relative_error(found, wanted) < 1e-12
    assert len(merges) == 1  # forward and backward


def test_once_a_window_and_again_when_the_coefficients_move(numbers, relative_error, merges) -> None:
    layer, plain = make_layer(numbers, cache=True), make_layer(numbers)
    x = numbers(5, IN, seed=7).requires_grad_()

    def agree() -> None:
        for found, wanted in zip(results(layer, x), results(plain, x), strict=True):
            assert relative_error(found, wanted) < 1e-12

    for _ in range(4):
        agree()
    assert len(merges) == 1
    for one in (layer, plain):
        one.coefficients.set(torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True))
    agree()
    agree()
    assert len(merges) == 2
    for one in (layer, plain):
        with torch.no_grad():
            one.coefficients.value.mul_(0.5)
    agree()
    assert len(merges) == 3
    optimizer = torch.optim.AdamW([layer.coefficients.value, plain.coefficients.value], lr=0.1)
    for one in (layer, plain):
        one(x).sum().backward()
    optimizer.step()
    agree()
    assert len(merges) == 4


def test_a_dtype_of_its_own(numbers, merges) -> None:
    layer = make_layer(numbers, cache=True)
    x = numbers(5, IN, seed=7, dtype=torch.float32)
    layer.float()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and len(merges) == 2
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.2)  # sums of 40 products of size up to 5, 2^-8 each


def test_the_cached_weight_is_not_in_the_state(numbers) -> None:
    layer = make_layer(numbers, cache=True)
    layer(numbers(5, IN, seed=7))
    assert set(layer.state_dict()) == {"original.weight", "original.bias"}


def test_backward_uses_the_weight_of_its_own_forward_pass(numbers, relative_error) -> None:
    """Coefficients that move between forward and backward do not reach into a pass that is under way."""
    layer, plain = make_layer(numbers, cache=True), make_layer(numbers)
    x = numbers(5, IN, seed=7).requires_grad_()
    (expected,) = torch.autograd.grad(plain(x).sin().sum(), x)
    y = layer(x)
    layer.coefficients.set(torch.zeros(1, 3, dtype=torch.float64))
    layer(x)
    (found,) = torch.autograd.grad(y.sin().sum(), x)
    assert relative_error(found, expected) < 1e-12
