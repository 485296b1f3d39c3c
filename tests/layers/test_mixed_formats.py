"""Dense, int8, int4 and low-rank task vectors in one layer, against the explicit merge of their numbers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from scalemerge.layers import (
    Coefficients,
    LowRank,
    MergedConv1D,
    MergedEmbedding,
    MergedLinear,
    MergedModule,
    MergeSettings,
    attach,
    detach,
    quantize,
)

ROWS, COLUMNS = 37, 75  # neither fills groups of 32, 75 is odd: int4 has half a byte left over
C = [0.4, -0.7, 0.9, 0.0, -0.3]


def coefficients(*names):
    return Coefficients.uniform(names, torch.tensor(C, dtype=torch.float64, requires_grad=True))


def make_linear():
    return nn.Linear(COLUMNS, ROWS).double()


def make_conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(COLUMNS, ROWS).double()  # W lies [inputs, outputs] = [ROWS, COLUMNS]


def make_embedding():
    return nn.Embedding(ROWS, COLUMNS).double()


KINDS = {
    "linear": (make_linear, MergedLinear),
    "conv1d": (make_conv1d, MergedConv1D),
    "embedding": (make_embedding, MergedEmbedding),
    "any module": (make_linear, MergedModule),
}


def make_input(kind, numbers):
    if kind == "embedding":
        return torch.tensor([[3, 1, 3], [0, 36, 3]])
    return numbers(2, 5, ROWS if kind == "conv1d" else COLUMNS, seed=7).requires_grad_()


@pytest.mark.parametrize("precision", ["merge", "split"])
@pytest.mark.parametrize("chunk_bytes", [1, 32 * ROWS * 8, 2**20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("formats", ["all", "dense", "int8", "int4", "low-rank", "all but dense"])
def test_output_and_gradients(numbers, mixed, explicit, relative_error, kind, formats, chunk_bytes, precision) -> None:
    torch.manual_seed(0)
    make, layer_class = KINDS[kind]
    module = make()
    dense_one, int8, low, int4, low_too = mixed(ROWS, COLUMNS)
    vectors = {
        "all": [dense_one, int8, low, int4, low_too],
        "dense": [dense_one, dense_one * 2, dense_one.flip(0), dense_one.flip(1), dense_one / 3],
        "int8": [int8] * 5,
        "int4": [int4] * 5,
        "low-rank": [low, low_too, low, low_too, low],
        "all but dense": [int8, low, int4, low_too, int4],
    }[formats]
    given = {"weight": vectors}
    c = coefficients("l.weight")
    x = make_input(kind, numbers)
    wanted = (c.value,) if kind == "embedding" else (x, c.value)
    plain = Coefficients.uniform(["weight"], c.value)
    expected_y = explicit(module, given, plain, x)
    expected = torch.autograd.grad(torch.tanh(expected_y).sum(), wanted)
    layer = layer_class(module, given, c, "l", MergeSettings(chunk_bytes=chunk_bytes, precision=precision))
    y = layer(x)
    found = torch.autograd.grad(torch.tanh(y).sum(), wanted)
    assert relative_error(y, expected_y) < 1e-12  # float64: sums in another order
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_writes_the_merged_weight(mixed, dense, relative_error, kind) -> None:
    make, layer_class = KINDS[kind]
    module = make()
    before = module.weight.detach().clone()
    vectors = mixed(ROWS, COLUMNS)
    layer = layer_class(module, {"weight": vectors}, coefficients("l.weight"), "l")
    assert layer.restore(set()) is module
    assert relative_error(module.weight, before + sum(c * dense(v) for c, v in zip(C, vectors))) < 1e-14


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, COLUMNS)
        self.dense = make_linear()
        self.back = make_conv1d()
        self.norm = nn.LayerNorm(COLUMNS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.back(torch.tanh(self.dense(self.table(ids)))))


def test_a_model_that_mixes_them(mixed, task_vectors_of, explicit, relative_error) -> None:
    torch.manual_seed(0)
    model = Small().double()
    plain = copy.deepcopy(model)
    matrices = ("table.weight", "dense.weight", "back.weight")
    vectors = {name: mixed(ROWS, COLUMNS, seed=10 * i) for i, name in enumerate(matrices)}
    small = [name for name, parameter in model.named_parameters() if parameter.dim() == 1]
    vectors |= task_vectors_of(model, 5, names=small)
    c = coefficients(*vectors)
    ids = torch.tensor([[3, 1, 36], [0, 5, 3]])
    expected_y = explicit(plain, vectors, c, ids)
    (expected,) = torch.autograd.grad(expected_y.sin().sum(), c.value)
    attach(model, vectors, c)
    y = model(ids)
    (found,) = torch.autograd.grad(y.sin().sum(), c.value)
    assert relative_error(y, expected_y) < 1e-11 and relative_error(found, expected) < 1e-9
    detach(model)
    assert relative_error(model(ids), expected_y) < 1e-11


def test_low_rank_vectors_save_no_weight_and_no_input(numbers, newly_saved) -> None:
    """x A' is kept, [M, R] once as it is and once times c; x is not."""
    linear = nn.Linear(COLUMNS, ROWS, bias=False).double()
    pairs = [LowRank(numbers(2, COLUMNS, seed=i), numbers(ROWS, 2, seed=9 + i)) for i in range(5)]
    layer = MergedLinear(linear, {"weight": pairs}, coefficients("l.weight"), "l")
    x = numbers(6, COLUMNS, seed=3).requires_grad_() * 1.0
    kept, _ = newly_saved(layer, lambda: layer(x))
    assert sum(kept) <= 2 * 6 * 10 * 8 + 2 * 10 * 8  # and c[positions], [R]
    assert x.nbytes not in kept


def test_quantized_vectors_are_held_as_they_are(numbers) -> None:
    vectors = [quantize(numbers(64, 128, seed=i), bits, 64) for i, bits in enumerate((8, 4))]
    linear = nn.Linear(128, 64)
    layer = MergedLinear(linear, {"weight": vectors}, Coefficients.uniform(["l.weight"], torch.ones(2)), "l")
    held = layer.task_vectors["weight"]
    assert [value.data_ptr() for value in held.values] == [vector.values.data_ptr() for vector in vectors]
    assert held.nbytes == 64 * 128 + 64 * 64 + 2 * 64 * 2 * 2  # int8, int4, a bfloat16 scale a group of 64
