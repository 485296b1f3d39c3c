"""Coefficients of their own for each row of a weight (an output of a linear layer)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalemerge.layers import Coefficients, MergedConv1D, MergedEmbedding, MergedLinear, MergedModule, MergeSettings

OUT, IN = 37, 75


def by_row(numbers, experts=5, name="l.weight", rows=OUT):
    return {name: numbers(experts, rows, seed=20).requires_grad_()}


@pytest.mark.parametrize(
    "settings", [{}, {"chunk_bytes": 1}, {"chunk_bytes": 20_000}, {"precision": "split"}, {"cache": True}]
)
def test_output_and_gradients(numbers, mixed, dense, relative_error, settings) -> None:
    torch.manual_seed(0)
    linear, vectors, own = nn.Linear(IN, OUT).double(), mixed(OUT, IN), by_row(numbers)
    c = own["l.weight"]
    x = numbers(6, IN, seed=7).requires_grad_()
    weight = linear.weight.detach() + sum(one.unsqueeze(1) * dense(vector) for one, vector in zip(c, vectors))
    expected_y = nn.functional.linear(x, weight, linear.bias.detach())
    expected = torch.autograd.grad(expected_y.sin().sum(), (x, c))
    coefficients = Coefficients({}, torch.zeros(1, 5, dtype=torch.float64), own)
    layer = MergedLinear(linear, {"weight": vectors}, coefficients, "l", MergeSettings(**settings))
    y = layer(x)
    found = torch.autograd.grad(y.sin().sum(), (x, c))
    assert relative_error(y, expected_y) < 1e-12
    assert relative_error(found[0], expected[0]) < 1e-10 and relative_error(found[1], expected[1]) < 1e-10
    layer.restore(set())
    assert relative_error(linear.weight, weight.detach()) < 1e-14


def test_beside_coefficients_of_the_group(numbers, relative_error) -> None:
    """The bias of the same layer takes the group's."""
    linear = nn.Linear(IN, OUT).double()
    vectors = {"weight": [numbers(OUT, IN, seed=1)], "bias": [numbers(OUT, seed=2)]}
    value = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    own = by_row(numbers, experts=1)
    layer = MergedLinear(linear, vectors, Coefficients({"l.bias": 0}, value, own), "l")
    x = numbers(6, IN, seed=7)
    weight = linear.weight.detach() + own["l.weight"][0].unsqueeze(1) * vectors["weight"][0]
    expected_y = nn.functional.linear(x, weight, linear.bias.detach() + value[0, 0] * vectors["bias"][0])
    expected = torch.autograd.grad(expected_y.sin().sum(), (value, own["l.weight"]))
    found = torch.autograd.grad(layer(x).sin().sum(), (value, own["l.weight"]))
    assert relative_error(found[0], expected[0]) < 1e-10 and relative_error(found[1], expected[1]) < 1e-10


def test_sampled_rows_of_x_are_unbiased_here_too(numbers) -> None:
    linear = nn.Linear(IN, OUT).double()
    own = by_row(numbers, experts=1)
    coefficients = Coefficients({}, torch.zeros(1, 1, dtype=torch.float64), own)
    vectors = {"weight": [numbers(OUT, IN, seed=1)]}
    x = numbers(64, IN, seed=7)

    def gradient(settings):
        layer = MergedLinear(linear, vectors, coefficients, "l", settings)
        return lambda: torch.autograd.grad(layer(x).sin().sum(), own["l.weight"])[0]

    exact, draw = gradient(MergeSettings())(), gradient(MergeSettings(sample_rows=8))
    draws = torch.stack([draw() for _ in range(300)])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 300**0.5)
    assert error.max() < 5  # the largest of 37, in standard errors


def refused(module, layer_class, parameter, numbers, experts=1):
    weight = module.get_parameter(parameter)
    own = by_row(numbers, experts, f"l.{parameter}", len(weight))
    coefficients = Coefficients({}, torch.zeros(1, experts, dtype=torch.float64), own)
    vectors = {parameter: [numbers(*weight.shape, seed=i) for i in range(experts)]}
    return layer_class(module, vectors, coefficients, "l")


def test_refused_elsewhere(numbers) -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(ValueError, match=r"l\.weight: coefficients by row are for linear layers, not embeddings"):
        refused(nn.Embedding(5, 4).double(), MergedEmbedding, "weight", numbers)(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"l\.weight: coefficients by row are not supported for Conv1D"):
        refused(Conv1D(4, 5).double(), MergedConv1D, "weight", numbers)(numbers(2, 5))
    with pytest.raises(ValueError, match=r"l\.bias: coefficients by row are for the weights of linear layers only"):
        refused(nn.Linear(5, 4).double(), MergedLinear, "bias", numbers)(numbers(2, 5))
    with pytest.raises(ValueError, match=r"l\.weight: coefficients by row are for the weights of linear layers only"):
        refused(nn.LayerNorm(5).double(), MergedModule, "weight", numbers)(numbers(2, 5))
