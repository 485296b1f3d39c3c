"""MergedLinear against autograd through an explicit W(c), what it keeps for backward, and how much memory it takes."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalemerge.layers import Coefficients, MergedLinear, MergeSettings

IN, OUT = 6, 10
ROW = IN * 8  # bytes of one float64 row


def make_layer(vectors_of, experts, c, *, bias=True, chunk_bytes=ROW, names=("weight", "bias"), dtype=torch.float64):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype)
    vectors = vectors_of(linear, experts, names=names, scale=0.3)
    coefficients = Coefficients.uniform([f"layer.{name}" for name in vectors], c)
    return MergedLinear(linear, vectors, coefficients, "layer", MergeSettings(chunk_bytes=chunk_bytes)), vectors


def oracle(layer, vectors, x, c):
    """x W(c)' + b(c) through plain autograd."""
    w, b = layer.original.weight.detach(), layer.original.bias
    b = b.detach() if b is not None else None
    w = w + sum(value * vector for value, vector in zip(c, vectors["weight"]))
    if b is not None and "bias" in vectors:
        b = b + sum(value * vector for value, vector in zip(c, vectors["bias"]))
    return nn.functional.linear(x, w, b)


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("chunk_bytes", [1, ROW, 3 * ROW, 2**20])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_autograd(
    task_vectors_of, numbers, relative_error, experts, chunk_bytes, bias
) -> None:
    c = torch.tensor([0.4, -0.7, 0.0, 1.3, 0.2, -0.1][:experts], dtype=torch.float64, requires_grad=True)
    layer, vectors = make_layer(task_vectors_of, experts, c, bias=bias, chunk_bytes=chunk_bytes)
    x = numbers(2, 5, IN, seed=7).requires_grad_()
    weights = numbers(2, 5, OUT, seed=8)
    expected_y = oracle(layer, vectors, x, c)
    expected = torch.autograd.grad((torch.tanh(expected_y) * weights).sum(), (x, c))
    y = layer(x)
    found = torch.autograd.grad((torch.tanh(y) * weights).sum(), (x, c))
    assert relative_error(y, expected_y) < 1e-12
    assert relative_error(found[0], expected[0]) < 1e-10
    assert relative_error(found[1], expected[1]) < 1e-10


@hypothesis.settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 7), inputs=st.integers(1, 9), outputs=st.integers(1, 17), chunk_rows=st.integers(1, 20),
    c=st.lists(st.floats(-2, 2), min_size=1, max_size=5), transposed=st.booleans(),
)  # fmt: skip
def test_any_shape_and_stride(rows, inputs, outputs, chunk_rows, c, transposed) -> None:
    generator = torch.Generator().manual_seed(rows + 10 * inputs + 100 * outputs)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    linear = nn.Linear(inputs, outputs).double()
    vectors = {"weight": [draw(outputs, inputs) for _ in c]}
    c = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    settings = MergeSettings(chunk_bytes=chunk_rows * inputs * 8)
    layer = MergedLinear(linear, vectors, Coefficients.uniform(["l.weight"], c), "l", settings)
    x = (draw(inputs, rows).T if transposed else draw(rows, inputs)).requires_grad_()
    weights = draw(rows, outputs)
    expected = torch.autograd.grad((oracle(layer, vectors, x, c) ** 2 * weights).sum(), (x, c))
    found = torch.autograd.grad((layer(x) ** 2 * weights).sum(), (x, c))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("names", [("weight",), ("bias",)])
def test_task_vectors_for_one_parameter_only(task_vectors_of, numbers, relative_error, names) -> None:
    c = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    layer, vectors = make_layer(task_vectors_of, 2, c, names=names)
    x = numbers(5, IN, seed=7).requires_grad_()
    full = {"weight": [torch.zeros(OUT, IN, dtype=torch.float64)] * 2, **vectors}
    expected = torch.autograd.grad((oracle(layer, full, x, c) ** 3).sum(), (x, c))
    found = torch.autograd.grad((layer(x) ** 3).sum(), (x, c))
    assert relative_error(found[0], expected[0]) < 1e-10
    assert relative_error(found[1], expected[1]) < 1e-10


def test_gradients_by_central_differences(task_vectors_of, numbers) -> None:
    c = torch.tensor([0.4, -0.7, 0.0], dtype=torch.float64, requires_grad=True)
    layer, _ = make_layer(task_vectors_of, 3, c, chunk_bytes=3 * ROW)
    x = numbers(4, IN, seed=7).requires_grad_()

    def forward(x, c):
        layer.coefficients.set(c.unsqueeze(0))
        return torch.tanh(layer(x))

    assert torch.autograd.gradcheck(forward, (x, c))


@pytest.mark.parametrize("x_needs", [True, False])
@pytest.mark.parametrize("c_needs", [True, False])
def test_only_the_gradients_asked_for(task_vectors_of, numbers, relative_error, x_needs, c_needs) -> None:
    c = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=c_needs)
    layer, vectors = make_layer(task_vectors_of, 2, c)
    x = numbers(5, IN, seed=7).requires_grad_(x_needs)
    y = layer(x)
    assert y.requires_grad is (x_needs or c_needs)
    if not y.requires_grad:
        assert y.grad_fn is None
        return
    y.square().sum().backward()
    found = x.grad, c.grad
    x.grad = c.grad = None
    oracle(layer, vectors, x, c).square().sum().backward()
    for needed, one, other in zip((x_needs, c_needs), found, (x.grad, c.grad), strict=True):
        assert (one is not None) is needed
        if needed:
            assert relative_error(one, other) < 1e-10


def test_input_gradient_flows_through_the_delta_alone(task_vectors_of, numbers, relative_error) -> None:
    c = torch.tensor([0.4, -0.7], dtype=torch.float64)
    layer, vectors = make_layer(task_vectors_of, 2, c, bias=False)
    layer.original.weight.data.zero_()
    x = numbers(5, IN, seed=7).requires_grad_()
    layer(x).sum().backward()
    delta = 0.4 * vectors["weight"][0] - 0.7 * vectors["weight"][1]
    assert relative_error(x.grad, delta.sum(0).expand(5, IN)) < 1e-12


@pytest.mark.parametrize("experts", [1, 4])
def test_nothing_but_the_input_is_saved_for_backward(task_vectors_of, numbers, newly_saved, experts) -> None:
    c = torch.full((experts,), 0.2, dtype=torch.float64, requires_grad=True)
    layer, vectors = make_layer(task_vectors_of, experts, c, bias=False)
    hidden = numbers(3, 5, IN, seed=7).requires_grad_() * 1.0
    kept, _ = newly_saved(layer, lambda: layer(hidden))
    assert kept == [hidden.nbytes]
    weight = layer.weight.nbytes
    kept, _ = newly_saved(layer, lambda: oracle(layer, vectors, hidden, c))
    assert weight in kept, "the hook sees the merged weight that others keep"


def test_without_a_gradient_of_c_not_even_the_input_is_saved(task_vectors_of, numbers, newly_saved) -> None:
    layer, _ = make_layer(task_vectors_of, 2, torch.full((2,), 0.2, dtype=torch.float64))
    hidden = numbers(3, 5, IN, seed=7).requires_grad_() * 1.0
    kept, _ = newly_saved(layer, lambda: layer(hidden))
    assert kept == []


def test_autocast_bfloat16_is_close_and_returns_the_right_dtypes(task_vectors_of, numbers, relative_error) -> None:
    c = torch.tensor([0.4, -0.7], requires_grad=True)
    layer, vectors = make_layer(task_vectors_of, 2, c, dtype=torch.float32)
    x = numbers(64, IN, seed=7, dtype=torch.float32).requires_grad_()
    expected_y = oracle(layer, vectors, x, c)
    expected = torch.autograd.grad(torch.tanh(expected_y).sum(), (x, c))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(torch.tanh(y.float()).sum(), (x, c))
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.float32
    assert relative_error(y, expected_y) < 1e-2
    assert relative_error(found[0], expected[0]) < 1e-2
    assert relative_error(found[1], expected[1]) < 1e-2


def test_bfloat16_weights_are_rounded_once(numbers) -> None:
    """Output equals the product with round(W0 + sum c_i T_i), to which the bias is added before it is rounded; c's
    gradient stays float32."""
    linear = nn.Linear(32, 16).bfloat16()
    vectors = {
        "weight": [numbers(16, 32, seed=i, scale=0.01, dtype=torch.bfloat16) for i in range(4)],
        "bias": [numbers(16, seed=9 + i, scale=0.01, dtype=torch.bfloat16) for i in range(4)],
    }
    c = torch.full((4,), 0.1001, requires_grad=True)  # bfloat16 would make 0.1001 0.10009765625
    layer = MergedLinear(linear, vectors, Coefficients.uniform(["l.weight", "l.bias"], c), "l")
    exact = {
        name: (getattr(linear, name).double() + sum(c.detach().double()[i] * list_[i].double() for i in range(4)))
        for name, list_ in vectors.items()
    }
    assert torch.equal(layer.merged("bias"), exact["bias"].float().bfloat16())
    x = numbers(5, 32, seed=50, dtype=torch.bfloat16)
    y = layer(x)
    weight, bias = (exact[name].float().bfloat16() for name in ("weight", "bias"))
    assert torch.equal(y, nn.functional.linear(x, weight, bias))
    assert not torch.equal(y, nn.functional.linear(x, weight) + bias), "rounded once more"
    y.float().sum().backward()
    assert c.grad is not None and c.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(task_vectors_of, numbers, reentrant) -> None:
    c = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    layer, _ = make_layer(task_vectors_of, 2, c)
    x = numbers(5, IN, seed=7).requires_grad_()
    expected = torch.autograd.grad(torch.tanh(layer(x)).sum(), (x, c))
    torch.tanh(checkpoint(layer, x, use_reentrant=reentrant)).sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(c.grad, expected[1])


def test_two_uses_of_one_layer_add_their_gradients(task_vectors_of, numbers, relative_error) -> None:
    c = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    layer, vectors = make_layer(task_vectors_of, 2, c)
    one, two = numbers(5, IN, seed=7), numbers(3, IN, seed=8)
    (layer(one).square().sum() + layer(two).sin().sum()).backward()
    expected = torch.autograd.grad(
        oracle(layer, vectors, one, c).square().sum() + oracle(layer, vectors, two, c).sin().sum(), c
    )[0]
    assert relative_error(c.grad, expected) < 1e-10


def test_wrong_shapes_are_refused() -> None:
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match="task vector has shape"):
        MergedLinear(linear, {"weight": [torch.zeros(IN, OUT)]}, Coefficients.uniform(["l.weight"], torch.ones(1)), "l")
