"""Coefficient gradients: dc_i = <dY' x, T_i> against float64 autograd, finite differences and the formula.

Error bound: float32 sums of up to 200 terms stay within 1e-6 of the sum of magnitudes, |dY|' |x| times |T_i|; the
interpreter's and a GPU's products of float16 and bfloat16 inputs are exact in float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalemerge.kernels import coefficient_grad as module
from scalemerge.kernels.coefficient_grad import (
    coefficient_grad,
    coefficient_grad_reference,
    coefficient_grad_triton,
    embedding_coefficient_grad,
    gathered_products_reference,
    gathered_products_triton,
    inner_products,
)

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_products(
    kit: Any,
    found: Tensor,
    gradient: Tensor,
    magnitude: Tensor,
    vectors: Tensor,
    per_row: bool,
    tolerance: float = 1e-6,
) -> None:
    """found is <gradient, T_i> (row by row), within `tolerance` of the sum of magnitudes."""
    over = 2 if per_row else (1, 2)
    assert found.dtype == torch.float64
    kit.assert_within(found, (gradient * vectors).sum(over), tolerance * (magnitude * vectors.abs()).sum(over))


def factors(kit: Any, rows: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """dY [rows, N] and x [rows, K], then dY' x and |dY|' |x| in float64."""
    left, right = (kit.numbers(rows, width, seed=60 + i, dtype=dtype) for i, width in enumerate(shape))
    wide = left.double(), right.double()
    return left, right, wide[0].T @ wide[1], wide[0].abs().T @ wide[1].abs()


# --- the Triton kernel for products ---


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("experts", range(1, 17))
def test_kernel_mixed_experts(kit: Any, device: torch.device, experts: int, per_row: bool) -> None:
    kinds = [kit.KINDS[(experts + i) % len(kit.KINDS)] for i in range(experts)]
    shape = ((70, 200), (5, 33), (1, 1), (33, 129), (3, 300))[experts % 5]
    dtype = (torch.float32, torch.float16, torch.bfloat16)[experts % 3]
    case = kit.weights(kinds, shape, device=device, seed=experts)
    left, right, gradient, magnitude = factors(kit, (1, 7, 16, 90)[experts % 4], shape, dtype)
    found = coefficient_grad_triton(left.to(device), right.to(device), *case.lists, per_row=per_row)
    assert_products(kit, found, gradient, magnitude, case.exact_vectors, per_row)


@pytest.mark.parametrize("parts", [1, 2, 9])  # 9: more parts than there are tiles to contract
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("place", [(0, 0, 40, 400), (11, 128, 7, 100), (39, 256, 1, 144)])
def test_kernel_blocks_and_parts(
    kit: Any, device: torch.device, place: tuple[int, ...], per_row: bool, parts: int
) -> None:
    row, column, rows, columns = place
    case = kit.weights(["bfloat16", "int4/32", "int8/128", "int4/64"], (40, 400), device=device)
    left, right, gradient, magnitude = factors(kit, 70, (rows, columns))
    found = coefficient_grad_triton(
        left.to(device), right.to(device), *case.lists, first_row=row, first_column=column, per_row=per_row, parts=parts
    )
    block = case.exact_vectors[:, row : row + rows, column : column + columns]
    assert_products(kit, found, gradient, magnitude, block, per_row)


def test_kernel_refuses_to_cut_a_group(kit: Any, device: torch.device) -> None:
    case = kit.weights(["float32", "int8/64"], (8, 200), device=device)
    left, right, gradient, magnitude = factors(kit, 5, (8, 100))
    with pytest.raises(ValueError, match="first_column 32 is not a multiple of 64"):
        coefficient_grad_triton(left.to(device), right.to(device), *case.lists, first_column=32)
    dense = tuple(part[:1] for part in case.lists)
    found = coefficient_grad_triton(left.to(device), right.to(device), *dense, first_column=33)  # dense: anywhere
    assert_products(kit, found, gradient, magnitude, case.exact_vectors[:1, :, 33:133], False)


@pytest.mark.parametrize("per_row", [False, True])
def test_kernel_without_rows_is_zero(kit: Any, device: torch.device, per_row: bool) -> None:
    case = kit.weights(["float32", "float16"], (5, 7), device=device)
    nothing = torch.empty(0, 5, device=device), torch.empty(0, 7, device=device)
    found = coefficient_grad_triton(*nothing, *case.lists, per_row=per_row)
    assert torch.equal(found.cpu(), torch.zeros((2, 5) if per_row else 2, dtype=torch.float64))


@pytest.mark.parametrize("per_row", [False, True])
def test_kernel_is_the_float64_autograd_gradient(kit: Any, device: torch.device, per_row: bool) -> None:
    """dc of a loss of tanh(x W(c)'), by autograd through the formula in float64."""
    case = kit.weights(["float32", "int4/64", "int8/32"], (20, 130), device=device, per_row=per_row)
    x, weight = kit.numbers(30, 130, seed=70, scale=0.1), kit.numbers(30, 20, seed=71, dtype=torch.float64)
    c = case.coefficients.cpu().double().requires_grad_()
    y = x.double() @ (case.exact_base + (c.view(3, -1, 1) * case.exact_vectors).sum(0)).T
    y.retain_grad()
    (torch.tanh(y) * weight).sum().backward()
    assert y.grad is not None and c.grad is not None
    found = coefficient_grad_triton(y.grad.float().to(device), x.to(device), *case.lists, per_row=per_row)
    magnitude = y.grad.abs().T @ x.double().abs()
    sizes = (magnitude * case.exact_vectors.abs()).sum(2 if per_row else (1, 2))
    kit.assert_within(found, c.grad, 1e-6 * sizes)


@pytest.mark.parametrize("per_row", [False, True])
def test_kernel_repeats_equal_bits(kit: Any, device: torch.device, per_row: bool) -> None:
    case = kit.weights(kit.KINDS[:4], (33, 129), device=device)
    left, right, *_ = factors(kit, 70, (33, 129))
    runs = [
        coefficient_grad_triton(left.to(device), right.to(device), *case.lists, per_row=per_row, parts=2)
        for _ in range(10)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


@settings(max_examples=30)
@given(data=st.data(), shape=st.tuples(st.integers(1, 70), st.integers(1, 300)), rows=st.integers(1, 70))
def test_kernel_any_shape_stride_and_block(
    kit: Any, device: torch.device, data: st.DataObject, shape: tuple[int, int], rows: int
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(kit.KINDS), min_size=1, max_size=4))
    padding, per_row = data.draw(st.integers(0, 5)), data.draw(st.booleans())
    case = kit.weights(kinds, shape, device=device, padding=padding)
    row, column = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    if any("/" in kind for kind in kinds):
        column = column // 128 * 128
    height, width = data.draw(st.integers(1, shape[0] - row)), data.draw(st.integers(1, shape[1] - column))
    left, right, gradient, magnitude = factors(kit, rows, (height, width))
    found = coefficient_grad_triton(
        kit.padded(left, padding).to(device), kit.padded(right, padding).to(device), *case.lists,
        first_row=row, first_column=column, per_row=per_row, parts=data.draw(st.sampled_from([None, 1, 2])),
    )  # fmt: skip
    block = case.exact_vectors[:, row : row + height, column : column + width]
    assert_products(kit, found, gradient, magnitude, block, per_row)


@settings(max_examples=15)
@given(stride=st.integers(2**10, 2**30), offset=st.integers(2**31, 2**40), per_row=st.booleans())
def test_kernel_far_rows_of_task_vectors(
    kit: Any, device: torch.device, stride: int, offset: int, per_row: bool
) -> None:
    row = offset // stride + 1  # its first element lies past 2^31 others
    case = kit.weights(["float32", "int8/32", "int4/64"], (9, 70))
    values, scales, groups = case.lists
    left, right, gradient, magnitude = factors(kit, 5, (9, 70))
    far = [kit.FarMatrix(tensor, stride, row) for tensor in (*values, *scales[1:])]
    with kit.far_memory(*far):
        found = coefficient_grad_triton(
            left, right, far[:3], [scales[0], *far[3:]], groups, first_row=row, per_row=per_row
        )
    assert_products(kit, found, gradient, magnitude, case.exact_vectors, per_row)


@pytest.mark.parametrize("stride", [2**27, 2**31 - 1, 2**33])
def test_kernel_far_rows_of_activations(kit: Any, device: torch.device, stride: int) -> None:
    """39 rows, so that the last ones lie past 2^31 elements."""
    case = kit.weights(["float32"], (9, 70))
    left, right, gradient, magnitude = factors(kit, 39, (9, 70))
    far = kit.FarMatrix(left, stride), kit.FarMatrix(right, stride)
    with kit.far_memory(*far):
        found = coefficient_grad_triton(*far, *case.lists)
    assert_products(kit, found, gradient, magnitude, case.exact_vectors, False)


# --- the Triton kernel for gathered rows ---


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("experts", range(1, 17))
def test_gathered_kernel(kit: Any, device: torch.device, experts: int, with_ids: bool) -> None:
    kinds = [kit.KINDS[(experts + i) % len(kit.KINDS)] for i in range(experts)]
    shape = ((70, 200), (5, 33), (1, 1), (33, 129), (300, 20))[experts % 5]
    case = kit.weights(kinds, shape, device=device, seed=experts)
    ids = torch.randint(0, shape[0], (45,), generator=torch.Generator().manual_seed(0)) if with_ids else None
    dtype = (torch.float32, torch.float16, torch.bfloat16)[experts % 3]
    gradient = kit.numbers(shape[0] if ids is None else 45, shape[1], seed=80, dtype=dtype)
    found = gathered_products_triton(gradient.to(device), *case.lists, None if ids is None else ids.to(device))
    vectors = case.exact_vectors if ids is None else case.exact_vectors[:, ids]
    assert_products(kit, found, gradient.double(), gradient.double().abs(), vectors, False)


def test_gathered_kernel_takes_no_rows(kit: Any, device: torch.device) -> None:
    case = kit.weights(["float32", "float16"], (5, 7), device=device)
    found = gathered_products_triton(
        torch.empty(0, 7, device=device), *case.lists, torch.empty(0, dtype=torch.int64, device=device)
    )
    assert found.tolist() == [0.0, 0.0] and found.dtype == torch.float64


def test_gathered_kernel_repeats_equal_bits(kit: Any, device: torch.device) -> None:
    case = kit.weights(kit.KINDS[:4], (50, 129), device=device)
    gradient, ids = kit.numbers(200, 129, seed=80).to(device), (torch.arange(200) * 7 % 50).to(device)
    runs = [gathered_products_triton(gradient, *case.lists, ids) for _ in range(10)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@settings(max_examples=15)
@given(stride=st.integers(2**10, 2**30), offset=st.integers(2**31, 2**40), padding=st.integers(0, 5))
def test_gathered_kernel_far_rows(kit: Any, device: torch.device, stride: int, offset: int, padding: int) -> None:
    row = offset // stride + 1
    case = kit.weights(["float32", "int8/32", "int4/64"], (9, 70), padding=padding)
    values, scales, groups = case.lists
    far = [kit.FarMatrix(tensor, stride, row) for tensor in (*values, *scales[1:])]
    ids = torch.tensor([8, 0, 3, 3])
    gradient = kit.numbers(4, 70, seed=80)
    with kit.far_memory(*far):
        found = gathered_products_triton(
            kit.padded(gradient, padding), far[:3], [scales[0], *far[3:]], groups, ids + row
        )
    assert_products(kit, found, gradient.double(), gradient.double().abs(), case.exact_vectors[:, ids], False)


# --- the torch references ---


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 150)),
    rows=st.integers(1, 9),
    kinds=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    per_row=st.booleans(),
    along=st.booleans(),
)
def test_reference_summed_over_any_blocks_is_the_formula(
    kit: Any, shape: tuple[int, int], rows: int, kinds: list[int], cuts: list[float], per_row: bool, along: bool
) -> None:
    case = kit.weights([kit.KINDS[kind] for kind in kinds], shape)
    left, right, gradient, magnitude = factors(kit, rows, shape, torch.float64)
    size = shape[0 if along else 1]
    parts = []
    for cut in pairwise(sorted({0, size, *(round(cut * size) for cut in cuts)})):
        block = {"rows" if along else "columns": cut}
        own = (left[:, slice(*cut)], right) if along else (left, right[:, slice(*cut)])
        parts.append(coefficient_grad_reference(*own, *case.lists, shape, **block, per_row=per_row))
    found = torch.cat(parts, 1) if per_row and along else torch.stack(parts).sum(0)
    assert_products(kit, found, gradient, magnitude, case.exact_vectors, per_row, 1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance",
    # float32: sums; else dY' x is made by torch in that dtype, and rounded to it once
    [(torch.float32, 1e-6), (torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)],
)
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_in_lower_precision(kit: Any, per_row: bool, dtype: torch.dtype, tolerance: float) -> None:
    case = kit.weights(kit.KINDS, (24, 150))
    left, right, gradient, magnitude = factors(kit, 32, (24, 150), dtype)
    found = coefficient_grad_reference(left, right, *case.lists, case.shape, per_row=per_row)
    assert_products(kit, found, gradient, magnitude, case.exact_vectors, per_row, tolerance)


@pytest.mark.parametrize("per_row", [False, True])
def test_reference_is_the_derivative_by_central_differences(kit: Any, per_row: bool) -> None:
    case = kit.weights(["float32", "int8/32", "int4/32"], (4, 40), base=torch.float64)
    x, weight = (kit.numbers(*shape, seed=70, dtype=torch.float64, scale=0.1) for shape in ((6, 40), (6, 4)))
    c = kit.numbers(3, *([4] if per_row else []), seed=71, dtype=torch.float64)

    def product(c: Tensor) -> Tensor:
        return x @ (case.exact_base + (c.view(3, -1, 1) * case.exact_vectors).sum(0)).T

    def loss(c: Tensor) -> Tensor:
        return (torch.tanh(product(c)) * weight).sum()

    dy = weight * (1 - torch.tanh(product(c)) ** 2)
    found = coefficient_grad_reference(dy, x, *case.lists, case.shape, per_row=per_row)
    shifts = 1e-6 * torch.eye(c.numel(), dtype=torch.float64).view(-1, *c.shape)
    differences = torch.stack([(loss(c + shift) - loss(c - shift)) / 2e-6 for shift in shifts]).view(c.shape)
    torch.testing.assert_close(found, differences, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_embedding_equals_the_scattered_gradient(kit: Any, dtype: torch.dtype, tolerance: float) -> None:
    ids = torch.tensor([3, 1, 3, 0, 3, 6])  # a repeated row counts each time
    case = kit.weights(["float32", "int8/32", "int4/64"], (7, 70))
    gradient = kit.numbers(6, 70, seed=0, dtype=dtype)
    scattered = torch.zeros(7, 70, dtype=torch.float64).index_add_(0, ids, gradient.double())
    magnitude = torch.zeros(7, 70, dtype=torch.float64).index_add_(0, ids, gradient.double().abs())
    found = embedding_coefficient_grad(ids, gradient, *case.lists)
    assert_products(kit, found, scattered, magnitude, case.exact_vectors, False, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A sum in bfloat16 stops growing at 256 ones; T_i keeps its float32 digits."""
    ones = torch.ones(1000, 3, dtype=dtype)
    vector = torch.full((1000, 3), 1 + 2.0**-12)
    assert inner_products(ones, [vector], [torch.empty(0)], [0]).item() == pytest.approx(
        3000 * (1 + 2.0**-12), rel=1e-6
    )


@pytest.mark.parametrize("shape", [(7,), (4, 3, 2)])
def test_inner_products_of_any_shape(kit: Any, shape: tuple[int, ...]) -> None:
    gradient = kit.numbers(*reversed(shape), seed=0, dtype=torch.float64).permute(*reversed(range(len(shape))))
    vectors = [kit.numbers(*shape, seed=1 + i, dtype=torch.float64) for i in range(2)]
    found = gathered_products_reference(gradient, vectors, [torch.empty(0)] * 2, [0, 0])
    torch.testing.assert_close(found, torch.stack([(gradient * vector).sum() for vector in vectors]))


# --- the custom ops ---


def op_arguments(kit: Any, per_row: bool, device: torch.device | None = None) -> tuple[tuple[Any, ...], Any]:
    """coefficient_grad's arguments for the block [1, 3) x [0, 32) of a weight, and the weight."""
    case = kit.weights(["float32", "int4/32"], (4, 40), device=device)
    left, right = kit.numbers(5, 2, seed=1), kit.numbers(5, 32, seed=2)
    lists = [list(part) for part in case.lists]
    return (left.to(device), right.to(device), *lists, [4, 40], 1, 3, 0, 32, per_row), case


@pytest.mark.parametrize("per_row", [False, True])
def test_coefficient_grad_is_a_well_formed_op(kit: Any, per_row: bool) -> None:
    torch.library.opcheck(coefficient_grad, op_arguments(kit, per_row)[0])


def test_embedding_coefficient_grad_is_a_well_formed_op(kit: Any) -> None:
    case = kit.weights(["float32", "int4/32"], (4, 40))
    lists = [list(part) for part in case.lists]
    torch.library.opcheck(embedding_coefficient_grad, (torch.tensor([3, 1, 3]), kit.numbers(3, 40, seed=1), *lists))


@pytest.mark.parametrize("by", ["kernels", "references"])
@pytest.mark.parametrize("per_row", [False, True])
def test_ops_take_either_way(
    kit: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, per_row: bool, by: str
) -> None:
    monkeypatch.setattr(module, "use_triton", lambda tensor: by == "kernels")
    arguments, case = op_arguments(kit, per_row, device)
    wide = [factor.cpu().double() for factor in arguments[:2]]
    block = case.exact_vectors[:, 1:3, :32]
    found = coefficient_grad(*arguments)
    assert_products(kit, found, wide[0].T @ wide[1], wide[0].abs().T @ wide[1].abs(), block, per_row)
    ids, gradient = torch.tensor([3, 1, 3]), kit.numbers(40, 3, seed=1).T  # not contiguous
    found = embedding_coefficient_grad(ids.to(device), gradient.to(device), *arguments[2:5])
    assert_products(kit, found, gradient.double(), gradient.double().abs(), case.exact_vectors[:, ids], False)
