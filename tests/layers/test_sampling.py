"""sample_rows: the coefficients' gradient from some rows alone, unbiased and seeded; that of the input stays exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalemerge.layers import Coefficients, MergedConv1D, MergedLinear, MergeSettings

ROWS, IN, OUT = 64, 12, 10


def make_layer(numbers, *, kind="linear", c_needs=True, **settings):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    module = (nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)).double()
    vectors = {
        "weight": [numbers(*module.weight.shape, seed=i) for i in range(3)],
        "bias": [numbers(OUT, seed=5 + i) for i in range(3)],
    }
    value = torch.tensor([[0.4, -0.7, 0.2], [0.1, 0.1, 0.1]], dtype=torch.float64, requires_grad=c_needs)
    coefficients = Coefficients({"l.weight": 0, "l.bias": 1}, value)
    layer_class = MergedLinear if kind == "linear" else MergedConv1D
    return layer_class(module, vectors, coefficients, "l", MergeSettings(**settings))


def gradients(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), (x, layer.coefficients.value))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("every", [2, 8, 7])
def test_unbiased(numbers, relative_error, kind, every) -> None:
    """The mean of 400 draws is within 4 standard errors of the exact gradient, and the draws do differ."""
    x = numbers(ROWS, IN, seed=7).requires_grad_()
    exact_dx, exact = gradients(make_layer(numbers, kind=kind), x)
    layer = make_layer(numbers, kind=kind, sample_rows=every)
    draws = []
    for _ in range(400):
        dx, dc = gradients(layer, x)
        assert torch.equal(dx, exact_dx)
        draws.append(dc)
    draws = torch.stack(draws)
    error, standard = draws.mean(0)[0] - exact[0], draws.std(0)[0] / 400**0.5
    assert (error.abs() < 4 * standard).all()
    assert (standard > 1e-4 * exact[0].abs()).all()
    assert relative_error(draws[0][1], exact[1]) < 1e-12, "biases are not sampled: they cost nothing"


def test_seeded(numbers) -> None:
    x = numbers(ROWS, IN, seed=7).requires_grad_()

    def run(seed):
        layer = make_layer(numbers, sample_rows=4, seed=seed)
        return [gradients(layer, x)[1] for _ in range(3)]

    one, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not any(torch.equal(a, b) for a, b in zip(one, other))
    assert not torch.equal(one[0], one[1]), "each pass draws anew"


def test_it_leaves_the_global_generator_alone(numbers) -> None:
    layer, x = make_layer(numbers, sample_rows=4), numbers(ROWS, IN, seed=7)
    before = torch.random.get_rng_state()
    layer(x).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("every", [1, 4, 7])
def test_only_the_sampled_rows_are_kept(numbers, newly_saved, every) -> None:
    layer = make_layer(numbers, sample_rows=every)
    hidden = numbers(ROWS, IN, seed=7).requires_grad_() * 1.0
    kept, _ = newly_saved(layer, lambda: layer(hidden))
    picked = -(-ROWS // every)
    numbers_of_rows = [picked * 8] if every > 1 else []
    # besides: the bias layer's one gradient needs T_i alone
    assert kept == sorted([picked * IN * 8, *numbers_of_rows])


def test_no_sampling_without_a_gradient_of_c(numbers, newly_saved, monkeypatch) -> None:
    layer = make_layer(numbers, sample_rows=4, c_needs=False)
    monkeypatch.setattr(MergeSettings, "sample", lambda *_: pytest.fail("rows are drawn in vain"))
    hidden = numbers(ROWS, IN, seed=7).requires_grad_() * 1.0
    kept, y = newly_saved(layer, lambda: layer(hidden))
    assert kept == []
    y.sum().backward()


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_few_rows_are_all_used(numbers, rows) -> None:
    x = numbers(rows, IN, seed=7).requires_grad_()
    exact = gradients(make_layer(numbers), x)
    assert all(torch.equal(a, b) for a, b in zip(gradients(make_layer(numbers, sample_rows=4), x), exact))


def test_under_checkpointing(numbers) -> None:
    """The second forward pass draws again; the estimate is made from that draw, whole."""
    layer, x = make_layer(numbers, sample_rows=2), numbers(ROWS, IN, seed=7).requires_grad_()
    exact_dx, _ = gradients(make_layer(numbers), x)
    seeded = make_layer(numbers, sample_rows=2)
    gradients(seeded, x)
    second = gradients(seeded, x)[1]
    y = checkpoint(layer, x, use_reentrant=False)
    dx, dc = torch.autograd.grad(y.square().sum(), (x, layer.coefficients.value))
    assert torch.equal(dx, exact_dx) and torch.equal(dc, second)
