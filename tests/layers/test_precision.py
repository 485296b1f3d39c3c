"""precision="split": deltas that bfloat16 weights round away reach the output; nothing of a weight's size is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalemerge.layers import Coefficients, MergedConv1D, MergedLinear, MergeSettings

IN, OUT, C = 256, 128, 0.1


def make_layer(numbers, precision, dtype, bits=torch.float32):
    """A task vector of 0.2 % of W0, at c = 0.1: 0.02 %, where bfloat16 numbers are 0.4 to 0.8 % apart."""
    linear = nn.Linear(IN, OUT, bias=False).to(dtype)
    linear.weight.data = numbers(OUT, IN, seed=1, scale=0.03, dtype=dtype)
    delta = numbers(OUT, IN, seed=2, scale=0.03 * 0.002, dtype=bits)
    c = torch.tensor([C], dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    coefficients = Coefficients.uniform(["l.weight"], c)
    return MergedLinear(linear, {"weight": [delta]}, coefficients, "l", MergeSettings(precision=precision)), delta


def change_of_mean_output(numbers, precision, autocast=False):
    """Change of the output, mean over 1024 multiples of one input: the output's own rounding averages out, the weights'
    rounding does not. Returns found and exact."""
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, delta = make_layer(numbers, precision, dtype)
    layer.original.weight.data = layer.original.weight.data.bfloat16().to(dtype)  # autocast must lose nothing of W0
    x = (numbers(1, IN, seed=3) * torch.linspace(1, 2, 1024).unsqueeze(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        y, base = layer(x.to(dtype)), nn.functional.linear(x.to(dtype), layer.original.weight)
    assert y.dtype == base.dtype == torch.bfloat16
    return (y.double() - base.double()).mean(0), (x.double() @ delta.double().T * C).mean(0)


@pytest.mark.parametrize("autocast", [False, True])
def test_split_keeps_a_delta_that_bfloat16_rounds_away(numbers, relative_error, autocast) -> None:
    found, exact = change_of_mean_output(numbers, "split", autocast)
    merged, _ = change_of_mean_output(numbers, "merge", autocast)
    assert relative_error(found, exact) < 0.3  # what is left is the outputs' rounding, 1/32 of it after 1024 rows
    assert relative_error(merged, exact) > 0.8
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.95
    assert torch.corrcoef(torch.stack([merged, exact]))[0, 1] < 0.6


def test_the_input_gradient_keeps_it_too(numbers, relative_error) -> None:
    changes = {}
    for precision in ("split", "merge"):
        layer, delta = make_layer(numbers, precision, torch.bfloat16)
        x = numbers(1024, IN, seed=3, dtype=torch.bfloat16).requires_grad_()
        dy = (numbers(1, OUT, seed=4) * torch.linspace(1, 2, 1024).unsqueeze(1)).bfloat16()
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        base = dy @ layer.original.weight
        exact = (dy.double() @ delta.double() * C).mean(0)
        changes[precision] = relative_error((dx.double() - base.double()).mean(0), exact)
    assert changes["split"] < 0.3 and changes["merge"] > 0.8


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_exact_in_float64(numbers, relative_error, along_rows, chunk_bytes) -> None:
    from transformers.pytorch_utils import Conv1D

    module = nn.Linear(40, 24).double() if along_rows else Conv1D(24, 40).double()
    shape, kind = module.weight.shape, MergedLinear if along_rows else MergedConv1D
    vectors = {
        "weight": [numbers(*shape, seed=i) for i in range(2)],
        "bias": [numbers(24, seed=5 + i) for i in range(2)],
    }
    c = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    coefficients = Coefficients.uniform(["l.weight", "l.bias"], c)
    x = numbers(7, 40, seed=9).requires_grad_()
    results = []
    for precision in ("merge", "split"):
        layer = kind(module, vectors, coefficients, "l", MergeSettings(chunk_bytes=chunk_bytes, precision=precision))
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, c))))
    for merged, split in zip(*results):
        assert relative_error(split, merged) < 1e-12


def test_the_gradient_of_c_is_no_other(numbers, relative_error) -> None:
    """dc = <dY' x, T> has no W(c) in it: equal for equal dY."""
    found = {}
    x, dy = numbers(64, IN, seed=3, dtype=torch.bfloat16), numbers(64, OUT, seed=4, dtype=torch.bfloat16)
    for precision in ("split", "merge"):
        layer, delta = make_layer(numbers, precision, torch.bfloat16)
        (found[precision],) = torch.autograd.grad(layer(x), layer.coefficients.value, dy)
    assert torch.equal(found["split"], found["merge"])
    exact = ((dy.double().T @ x.double()) * delta.double()).sum().reshape(1, 1)
    assert relative_error(found["split"], exact) < 0.02  # dW is rounded to bfloat16, 2^-9 a number


@pytest.mark.parametrize("bits", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["merge", "split"])
def test_autocast_keeps_no_cast_copy_of_a_weight(numbers, newly_saved, precision, bits) -> None:
    """Autocast keeps its bfloat16 copy of nn.Linear's weight for backward; here only the cast input is kept."""
    layer, _ = make_layer(numbers, precision, torch.float32, bits)
    x = numbers(8, IN, seed=3, dtype=torch.float32).requires_grad_() * 1.0
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = newly_saved(layer, lambda: layer(x))
        others, _ = newly_saved(layer, lambda: nn.functional.linear(x, layer.weight))
    assert kept == [x.numel() * 2]
    assert layer.weight.numel() * 2 in others
