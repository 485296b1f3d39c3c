"""Merged norms (and any other module) against autograd through explicit parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalemerge.layers import Coefficients, MergedModule

WIDTH = 6


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def rms_norm() -> nn.Module:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    return Qwen3RMSNorm(WIDTH)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, WIDTH)


@pytest.mark.parametrize("make", [layer_norm, rms_norm, conv1d])
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 6])
def test_output_and_gradients_equal_autograd(task_vectors_of, numbers, relative_error, explicit, make, experts) -> None:
    torch.manual_seed(0)
    module = make().double()
    vectors = task_vectors_of(module, experts, scale=0.3)
    c = torch.tensor([0.4, -0.7, 0.0, 1.3, 0.2, -0.1][:experts], dtype=torch.float64, requires_grad=True)
    coefficients = Coefficients.uniform([f"norm.{name}" for name in vectors], c)
    layer = MergedModule(module, vectors, coefficients, "norm")
    x = numbers(2, 5, WIDTH, seed=7).requires_grad_()
    y = layer(x)
    weights = numbers(*y.shape, seed=8)
    plain = Coefficients.uniform(vectors, c)
    expected_y = explicit(module, vectors, plain, x)
    expected = torch.autograd.grad((torch.tanh(expected_y) * weights).sum(), (x, c))
    found = torch.autograd.grad((torch.tanh(y) * weights).sum(), (x, c))
    assert relative_error(y, expected_y) < 1e-12
    assert relative_error(found[0], expected[0]) < 1e-10
    assert relative_error(found[1], expected[1]) < 1e-10


def test_float32_norms_in_a_bfloat16_model(numbers) -> None:
    """Parameters keep their dtype (LayerNorm refuses mixed ones), and are summed in float32 and rounded once."""
    module = nn.LayerNorm(WIDTH).bfloat16()
    for stored in (torch.bfloat16, torch.float32):
        vectors = {
            name: [numbers(WIDTH, seed=i + shift, scale=0.02, dtype=stored) for i in range(4)]
            for shift, name in enumerate(("weight", "bias"))
        }
        c = torch.full((4,), 0.1001, requires_grad=True)
        layer = MergedModule(module, vectors, Coefficients.uniform(["n.weight", "n.bias"], c), "n")
        for name, list_ in vectors.items():
            exact = getattr(module, name).double() + sum(c.detach().double()[i] * list_[i].double() for i in range(4))
            assert torch.equal(layer.merged(name), exact.float().bfloat16())
        y = layer(numbers(3, WIDTH, seed=20, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert c.grad is not None and c.grad.dtype == torch.float32


def test_one_parameter_moved_the_other_stays(numbers) -> None:
    module = nn.LayerNorm(WIDTH).double()
    c = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    vectors = {"bias": [torch.ones(WIDTH, dtype=torch.float64)]}
    layer = MergedModule(module, vectors, Coefficients.uniform(["n.bias"], c), "n")
    x = numbers(3, WIDTH, seed=1)
    torch.testing.assert_close(layer(x), module(x) + 2.0)
