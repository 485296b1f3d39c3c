"""MergedEmbedding against autograd through an explicit table W(c)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalemerge.layers import Coefficients, MergedEmbedding


def make_layer(vectors_of, experts, c, dtype=torch.float64, rows=9, width=4):
    torch.manual_seed(0)
    table = nn.Embedding(rows, width).to(dtype)
    vectors = vectors_of(table, experts, scale=0.3)
    return MergedEmbedding(table, vectors, Coefficients.uniform(["e.weight"], c), "e"), vectors["weight"]


def merged_table(layer, vectors, c):
    return layer.original.weight.detach() + sum(value * vector for value, vector in zip(c, vectors))


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 6])
def test_output_and_gradient_equal_autograd(task_vectors_of, numbers, relative_error, experts) -> None:
    c = torch.tensor([0.4, -0.7, 0.0, 1.3, 0.2, -0.1][:experts], dtype=torch.float64, requires_grad=True)
    layer, vectors = make_layer(task_vectors_of, experts, c)
    ids, weights = torch.tensor([[3, 1, 3], [0, 8, 3]]), numbers(2, 3, 4, seed=5)
    expected_y = nn.functional.embedding(ids, merged_table(layer, vectors, c))
    (expected,) = torch.autograd.grad((torch.tanh(expected_y) * weights).sum(), c)
    y = layer(ids)
    (found,) = torch.autograd.grad((torch.tanh(y) * weights).sum(), c)
    assert relative_error(y, expected_y) < 1e-12
    assert relative_error(found, expected) < 1e-10


def test_no_gradient_asked_for(task_vectors_of) -> None:
    layer, _ = make_layer(task_vectors_of, 2, torch.tensor([0.4, -0.7], dtype=torch.float64))
    assert not layer(torch.tensor([1, 2])).requires_grad


def test_the_padding_row_counts_where_its_output_does(task_vectors_of) -> None:
    """nn.Embedding drops the gradient of `padding_idx`; the derivative with respect to c does not vanish there."""
    c = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    table = nn.Embedding(9, 4, padding_idx=0).double()
    vectors = task_vectors_of(table, 2)
    layer = MergedEmbedding(table, vectors, Coefficients.uniform(["e.weight"], c), "e")
    layer(torch.tensor([0, 0])).sum().backward()
    torch.testing.assert_close(c.grad, torch.stack([2 * vector[0].sum() for vector in vectors["weight"]]))


def test_bfloat16_table_is_rounded_once(numbers) -> None:
    table = nn.Embedding(50, 8).bfloat16()
    vectors = [numbers(50, 8, seed=i, scale=0.01, dtype=torch.bfloat16) for i in range(4)]
    c = torch.full((4,), 0.1001, requires_grad=True)
    layer = MergedEmbedding(table, {"weight": vectors}, Coefficients.uniform(["e.weight"], c), "e")
    exact = table.weight.double() + sum(c.detach().double()[i] * vectors[i].double() for i in range(4))
    ids = torch.arange(50)
    assert torch.equal(layer(ids), exact.float().bfloat16())
    layer(ids).float().square().sum().backward()
    assert c.grad is not None and c.grad.dtype == torch.float32


def test_only_the_rows_that_occur_are_merged(live_bytes) -> None:
    """A vocabulary of 20,000 and 8 tokens: no tensor is made that is larger than the tokens' own rows."""
    table = nn.Embedding(20_000, 16)
    vectors = {"weight": [torch.ones(20_000, 16) for _ in range(4)]}
    c = torch.full((4,), 0.1, requires_grad=True)
    layer = MergedEmbedding(table, vectors, Coefficients.uniform(["e.weight"], c), "e")
    ids = torch.arange(8).reshape(2, 4)
    with live_bytes() as memory:
        layer(ids).square().sum().backward()
    assert memory.largest == 8 * 16 * 4
    assert memory.peak <= 5 * memory.largest  # not one copy an expert


def test_no_tokens_at_all(task_vectors_of) -> None:
    c = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    layer, _ = make_layer(task_vectors_of, 2, c)
    layer(torch.empty(0, 3, dtype=torch.long)).sum().backward()
    assert torch.equal(c.grad, torch.zeros_like(c))
