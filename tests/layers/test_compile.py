"""torch.compile: whole graphs of merged layers and of attached models, with the numbers of eager execution."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from scalemerge.layers import Coefficients, MergedLinear, MergeSettings, attach

OUT, IN, C = 37, 75, [0.4, -0.7, 0.9, 0.0, -0.3]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_layer(mixed, numbers, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT).double()
    vectors = {"weight": mixed(OUT, IN), "bias": [numbers(OUT, seed=50 + i) for i in range(5)]}
    c = torch.tensor([C], dtype=torch.float64, requires_grad=True)
    return MergedLinear(linear, vectors, Coefficients({"l.weight": 0, "l.bias": 0}, c), "l", MergeSettings(**settings))


def results(call, x, c):
    y = call(x)
    return (y, *torch.autograd.grad(y.sin().sum(), (x, c)))


@pytest.mark.parametrize("settings", [{}, {"precision": "split"}, {"chunk_bytes": 1000}])
def test_a_layer_is_one_graph(mixed, numbers, relative_error, settings) -> None:
    layer, x = make_layer(mixed, numbers, **settings), numbers(6, IN, seed=3).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        *(results(call, x, layer.coefficients.value) for call in (compiled, layer)), strict=True
    ):
        assert relative_error(found, expected) < 1e-14


def test_moving_the_coefficients_moves_the_compiled_layer(mixed, numbers, relative_error) -> None:
    layer, x = make_layer(mixed, numbers), numbers(6, IN, seed=3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first = compiled(x)
    layer.coefficients.set(torch.ones(1, 5, dtype=torch.float64))
    second = compiled(x)
    assert relative_error(second, layer(x)) < 1e-14 and relative_error(second, first) > 0.01
    layer.coefficients.value.mul_(3.0)
    assert relative_error(compiled(x), layer(x)) < 1e-14 and relative_error(compiled(x), second) > 0.01


@pytest.mark.parametrize("settings", [{"cache": True}, {"sample_rows": 2}])
def test_caching_and_sampling_break_the_graph_and_stay_right(mixed, numbers, relative_error, settings) -> None:
    layer, eager = make_layer(mixed, numbers, **settings), make_layer(mixed, numbers, **settings)
    x = numbers(6, IN, seed=3).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager")
    for factor in (1.0, 3.0):  # in place: what a compiled check of the cache would not see
        with torch.no_grad():
            layer.coefficients.value.mul_(factor)
            eager.coefficients.value.mul_(factor)
        pairs = zip(results(compiled, x, layer.coefficients.value), results(eager, x, eager.coefficients.value))
        assert all(relative_error(found, expected) < 1e-14 for found, expected in pairs)


def test_a_stack(task_vectors_of, explicit, relative_error) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 12), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12), nn.LayerNorm(12)
    ).double()
    vectors = task_vectors_of(model, 3)
    c = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    coefficients = Coefficients.uniform(vectors, c)
    ids = torch.tensor([[1, 8, 3], [0, 0, 2]])
    expected_y = explicit(model, vectors, coefficients, ids)
    (expected,) = torch.autograd.grad(expected_y.sin().sum(), c)
    attach(model, vectors, coefficients)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    assert relative_error(y, expected_y) < 1e-12
    assert relative_error(torch.autograd.grad(y.sin().sum(), c)[0], expected) < 1e-10


@pytest.mark.parametrize("backbone", ["bert", "qwen3"])
def test_attached_models_are_one_graph(make_backbone, task_vectors_of, tokens, relative_error, backbone) -> None:
    model = make_backbone(backbone)
    vectors = task_vectors_of(model, 2)
    c = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    attach(model, vectors, Coefficients.uniform(vectors, c))
    mask = tokens["attention_mask"].unsqueeze(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (y, dc), (expected_y, expected) = (
        (out * mask, torch.autograd.grad(((out * mask).sin()).sum(), c)[0])
        for out in (call(**tokens).last_hidden_state for call in (compiled, model))
    )
    assert relative_error(y, expected_y) < 1e-12 and relative_error(dc, expected) < 1e-10


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++: no g++")
def test_inductor(mixed, numbers, relative_error) -> None:
    layer, x = make_layer(mixed, numbers), numbers(6, IN, seed=3).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    for found, expected in zip(
        *(results(call, x, layer.coefficients.value) for call in (compiled, layer)), strict=True
    ):
        assert relative_error(found, expected) < 1e-12  # fused: sums in another order


def test_autocast(mixed, numbers, relative_error) -> None:
    layer = make_layer(mixed, numbers).float()
    x = numbers(6, IN, seed=3, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), layer(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_operators_keep_torch_rules(numbers) -> None:
    """torch's own check of custom operators: schema, fake tensors, autograd, tracing with dynamic shapes."""
    from scalemerge.layers.embedding import merged_embedding
    from scalemerge.layers.product import merged_product

    x, base = numbers(4, 6, seed=1).requires_grad_(), numbers(5, 6, seed=2)
    c = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    lists = [numbers(5, 6, seed=3), numbers(5, 6, seed=4)], [base.new_empty(0), base.new_empty(0)], [0, 0]
    arguments = (x, c, numbers(5, seed=6), base, *lists, None, None, True, False, "auto", 100)
    torch.library.opcheck(merged_product, arguments)
    torch.library.opcheck(merged_product, (x, c, None, base, *lists, torch.tensor([0, 2]), None, True, True, "auto", 9))
    torch.library.opcheck(merged_embedding, (torch.tensor([1, 1, 4]), c, base, *lists))
