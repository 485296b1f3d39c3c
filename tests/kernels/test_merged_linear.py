"""merged_linear: y = x W(c)' and y = x W(c) against the product written out in float64.

Error bounds, entry by entry: float32 sums of up to 200 terms stay within 1e-6 of the sum of magnitudes. With float16
activations the output is rounded once more (half a unit), and on a GPU the merged weight too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalemerge.kernels.merged_linear import merged_linear_reference, merged_linear_triton

pytestmark = pytest.mark.usefixtures("poisoned")


def exact_product(
    kit: Any, x: Tensor, case: Any, bias: Tensor | None, along_rows: bool, rounding: float | None = None
) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far off one in x's dtype may be."""
    weight, magnitude = case.merged, case.magnitude
    if along_rows:
        weight, magnitude = weight.T, magnitude.T
    x64 = x.cpu().double()
    y, size = x64 @ weight, x64.abs() @ magnitude
    if bias is not None:
        y, size = y + bias.cpu().double(), size + bias.cpu().double().abs()
    unit = rounding or (0.0 if x.dtype == torch.float32 else 2 * kit.UNIT[x.dtype])
    return y, (1e-6 + unit) * size + (2.0**-24 if x.dtype == torch.float16 else 0)


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("experts", range(1, 17))
def test_kernel_mixed_experts(kit: Any, device: torch.device, experts: int, along_rows: bool) -> None:
    kinds = [kit.KINDS[(experts + i) % len(kit.KINDS)] for i in range(experts)]
    shape = ((70, 200), (5, 33), (1, 1), (33, 129), (3, 300))[experts % 5]
    rows = (1, 7, 16, 33, 70)[experts % 5]
    base = (torch.float32, torch.bfloat16, torch.float16)[experts % 3]
    dtype = (torch.float32, torch.float16)[experts % 2]
    case = kit.weights(kinds, shape, device=device, base=base, seed=experts)
    x = kit.numbers(rows, shape[1] if along_rows else shape[0], seed=50, dtype=dtype).to(device)
    bias = kit.numbers(shape[0] if along_rows else shape[1], seed=51, dtype=dtype).to(device)
    for b in (None, bias):
        y = merged_linear_triton(
            x, case.base, *case.lists, case.coefficients, b, shape=case.shape, along_rows=along_rows
        )
        assert y.dtype == dtype
        kit.assert_within(y, *exact_product(kit, x, case, b, along_rows))


@pytest.mark.parametrize("parts", [1, 2, 9])  # 9: more parts than there are tiles to contract
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("base", [torch.float32, None])
@pytest.mark.parametrize("along_rows", [True, False])
def test_kernel_parts(
    kit: Any, device: torch.device, along_rows: bool, base: torch.dtype | None, per_row: bool, parts: int
) -> None:
    case = kit.weights(["float32", "int8/64", "int4/32"], (70, 200), device=device, base=base, per_row=per_row)
    x = kit.numbers(9, 200 if along_rows else 70, seed=50).to(device)
    bias = kit.numbers(70 if along_rows else 200, seed=51).to(device)
    y = merged_linear_triton(
        x, case.base, *case.lists, case.coefficients, bias, shape=case.shape, along_rows=along_rows, parts=parts
    )
    kit.assert_within(y, *exact_product(kit, x, case, bias, along_rows))


@pytest.mark.parametrize("along_rows", [True, False])
def test_kernel_bfloat16_activations(kit: Any, device: torch.device, along_rows: bool) -> None:
    """In several parts: their float32 sums are rounded by torch, not by the interpreter, whose stores truncate."""
    case = kit.weights(["bfloat16", "int4/64"], (40, 130), device=device, base=torch.bfloat16)
    x = kit.numbers(5, 130 if along_rows else 40, seed=50, dtype=torch.bfloat16).to(device)
    y = merged_linear_triton(
        x, case.base, *case.lists, case.coefficients, shape=case.shape, along_rows=along_rows, parts=2
    )
    assert y.dtype == torch.bfloat16
    kit.assert_within(y, *exact_product(kit, x, case, None, along_rows))


@pytest.mark.parametrize("along_rows", [True, False])
def test_kernel_repeats_equal_bits(kit: Any, device: torch.device, along_rows: bool) -> None:
    case = kit.weights(kit.KINDS[:4], (33, 129), device=device)
    x = kit.numbers(17, 129 if along_rows else 33, seed=50).to(device)
    runs = [
        merged_linear_triton(
            x, case.base, *case.lists, case.coefficients, shape=case.shape, along_rows=along_rows, parts=2
        )
        for _ in range(10)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_kernel_takes_no_rows(kit: Any, device: torch.device) -> None:
    case = kit.weights(["float32"], (5, 7), device=device)
    x = torch.empty(0, 7, device=device)
    assert merged_linear_triton(x, case.base, *case.lists, case.coefficients, shape=case.shape).shape == (0, 5)


def test_kernel_refuses_transposed_activations(kit: Any, device: torch.device) -> None:
    case = kit.weights(["float32"], (5, 7), device=device)
    x = torch.ones(7, 3, device=device).T
    with pytest.raises(ValueError, match="row-major"):
        merged_linear_triton(x, case.base, *case.lists, case.coefficients, shape=case.shape)


@settings(max_examples=30)
@given(data=st.data(), shape=st.tuples(st.integers(1, 70), st.integers(1, 140)), rows=st.integers(1, 70))
def test_kernel_any_shape_and_stride(
    kit: Any, device: torch.device, data: st.DataObject, shape: tuple[int, int], rows: int
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(kit.KINDS), min_size=1, max_size=4))
    base = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, None]))
    padding, along_rows = data.draw(st.integers(0, 5)), data.draw(st.booleans())
    case = kit.weights(kinds, shape, device=device, base=base, per_row=data.draw(st.booleans()), padding=padding)
    x = kit.padded(kit.numbers(rows, shape[1 if along_rows else 0], seed=50), padding)
    bias = kit.numbers(shape[0 if along_rows else 1], seed=51) if data.draw(st.booleans()) else None
    y = merged_linear_triton(
        x.to(device), case.base, *case.lists, case.coefficients, None if bias is None else bias.to(device),
        shape=shape, along_rows=along_rows, parts=data.draw(st.sampled_from([None, 1, 2])),
    )  # fmt: skip
    kit.assert_within(y, *exact_product(kit, x, case, bias, along_rows))


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("stride", [2**27, 2**31 - 1, 2**33])
def test_kernel_far_offsets(kit: Any, device: torch.device, stride: int, along_rows: bool) -> None:
    """39 rows, so that the last ones lie past 2^31 elements."""
    case = kit.weights(["float32", "int8/32", "int4/64"], (39, 70))
    values, scales, groups = case.lists
    x = kit.numbers(39, 70 if along_rows else 39, seed=50)
    far = [kit.FarMatrix(tensor, stride) for tensor in (x, case.base, *values, *scales[1:])]
    with kit.far_memory(*far):
        y = merged_linear_triton(
            far[0], far[1], far[2:5], [scales[0], *far[5:]], groups, case.coefficients,
            shape=case.shape, along_rows=along_rows,
        )  # fmt: skip
    kit.assert_within(y, *exact_product(kit, x, case, None, along_rows))


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reference_equals_the_formula(kit: Any, dtype: torch.dtype, per_row: bool, along_rows: bool) -> None:
    for base in (torch.float32, None):
        case = kit.weights(["float16", "int8/64", "int4/32"], (13, 70), base=base, per_row=per_row)
        x = kit.numbers(6, 70 if along_rows else 13, seed=50, dtype=dtype)
        bias = kit.numbers(13 if along_rows else 70, seed=51, dtype=dtype)
        y = merged_linear_reference(
            x, case.base, *case.lists, case.coefficients, bias, shape=case.shape, along_rows=along_rows
        )
        assert y.dtype == dtype
        # c of float32 may be applied in float32; bfloat16 rounds the weight, the product and the sum with the bias
        rounding = {torch.float64: 1e-7, torch.float32: None, torch.bfloat16: 3 * kit.UNIT[dtype]}[dtype]
        kit.assert_within(y, *exact_product(kit, x, case, bias, along_rows, rounding))
