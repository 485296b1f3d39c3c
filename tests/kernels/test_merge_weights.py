"""merge_weights: blocks of W0 + sum c_i T_i against the formula written out in float64.

Error bounds: E products and E sums in float32 are off by at most (E + 2) units of the sum of magnitudes; a store in
float16 adds half a unit of the result. The interpreter truncates stores in bfloat16, so only a GPU shows those
(test_gpu.py); bfloat16 weights and task vectors are read right and are tested here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalemerge.kernels import merge_weights as module
from scalemerge.kernels.formats import LowRank, accumulation_dtype
from scalemerge.kernels.merge_weights import (
    merge_weights,
    merge_weights_reference,
    merge_weights_triton,
    merged_weight,
)
from scalemerge.kernels.tiles import jit, tl, use_triton

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = ((1, 1), (70, 200), (5, 33), (33, 129), (3, 300), (129, 16))


def bound(kit: Any, case: Any, dtype: torch.dtype) -> Tensor:
    rounding = kit.UNIT[dtype] * case.magnitude + 2.0**-25 if dtype == torch.float16 else 0.0
    return (len(case.vectors) + 2) * kit.UNIT[torch.float32] * case.magnitude + rounding


# --- the Triton kernel ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("experts", range(1, 17))
def test_kernel_mixed_experts_on_ragged_shapes(
    kit: Any, device: torch.device, experts: int, dtype: torch.dtype
) -> None:
    kinds = [kit.KINDS[(experts + i) % len(kit.KINDS)] for i in range(experts)]
    base = (torch.float32, torch.float16, torch.bfloat16)[experts % 3]
    case = kit.weights(kinds, SHAPES[experts % len(SHAPES)], device=device, base=base, seed=experts)
    out = torch.empty(case.shape, dtype=dtype, device=device)
    assert merge_weights_triton(case.base, *case.lists, case.coefficients, out) is out
    kit.assert_within(out, case.merged, bound(kit, case, dtype))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("base", [torch.float32, None])
@pytest.mark.parametrize(
    "place", [(0, 0, 40, 150), (11, 0, 7, 100), (0, 64, 40, 86), (17, 128, 23, 22), (39, 32, 1, 1)]
)
def test_kernel_writes_a_block_and_nothing_else(
    kit: Any, device: torch.device, place: tuple[int, ...], base: torch.dtype | None, per_row: bool
) -> None:
    row, column, rows, columns = place
    group = 128 if column % 128 == 0 else 32
    kinds = ["bfloat16", f"int4/{group}", f"int8/{group}"]
    case = kit.weights(kinds, (40, 150), device=device, base=base, per_row=per_row)
    buffer = torch.full((rows + 5, columns + 9), float("nan"), device=device)
    out = buffer[2 : 2 + rows, 4 : 4 + columns]
    merge_weights_triton(case.base, *case.lists, case.coefficients, out, first_row=row, first_column=column)
    block = slice(row, row + rows), slice(column, column + columns)
    kit.assert_within(out, case.merged[block], bound(kit, case, torch.float32)[block])
    out.fill_(float("nan"))
    assert buffer.isnan().all()  # nothing was written around it


def test_kernel_takes_dense_blocks_at_any_column(kit: Any, device: torch.device) -> None:
    case = kit.weights(["float32", "float16"], (9, 70), device=device)
    out = torch.empty(4, 30, device=device)
    merge_weights_triton(case.base, *case.lists, case.coefficients, out, first_row=3, first_column=17)
    kit.assert_within(out, case.merged[3:7, 17:47], bound(kit, case, torch.float32)[3:7, 17:47])


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("per_row", [False, True])
def test_kernel_picks_rows_by_index(kit: Any, device: torch.device, per_row: bool, ids_dtype: torch.dtype) -> None:
    case = kit.weights(["float32", "int4/64", "int8/32"], (50, 77), device=device, per_row=per_row)
    ids = torch.randint(0, 50, (61,), generator=torch.Generator().manual_seed(0))
    ids[:3] = 49  # the last row, three times
    out = torch.empty(61, 77, device=device)
    merge_weights_triton(case.base, *case.lists, case.coefficients, out, index=ids.to(device, ids_dtype))
    kit.assert_within(out, case.merged[ids], bound(kit, case, torch.float32)[ids])


def test_kernel_refuses_what_it_would_read_wrong(kit: Any, device: torch.device) -> None:
    case = kit.weights(["int8/64"], (8, 200), device=device)
    with pytest.raises(ValueError, match="first_column 32 is not a multiple of 64"):
        merge_weights_triton(
            case.base, *case.lists, case.coefficients, torch.empty(8, 100, device=device), first_column=32
        )
    dense = kit.weights(["float32"], (8, 8), device=device)
    with pytest.raises(ValueError, match="row-major"):
        merge_weights_triton(dense.base.T, *dense.lists, dense.coefficients, torch.empty(8, 8, device=device))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_kernel_takes_empty_blocks(kit: Any, device: torch.device, shape: tuple[int, int]) -> None:
    case = kit.weights(["float32"], (5, 5), device=device)
    out = torch.empty(shape, device=device)
    assert merge_weights_triton(case.base, *case.lists, case.coefficients, out) is out


def test_kernel_repeats_equal_bits(kit: Any, device: torch.device) -> None:
    case = kit.weights(kit.KINDS, (33, 129), device=device)
    runs = [
        merge_weights_triton(case.base, *case.lists, case.coefficients, torch.empty(case.shape, device=device))
        for _ in range(10)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


@settings(max_examples=30)
@given(data=st.data(), rows=st.integers(1, 40), columns=st.integers(1, 180), padding=st.integers(0, 5))
def test_kernel_any_shape_stride_and_block(
    kit: Any, device: torch.device, data: st.DataObject, rows: int, columns: int, padding: int
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(kit.KINDS), min_size=1, max_size=4))
    base = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, None]))
    case = kit.weights(
        kinds, (rows, columns), device=device, base=base, per_row=data.draw(st.booleans()), padding=padding
    )
    row = data.draw(st.integers(0, rows - 1))
    column = data.draw(st.integers(0, columns - 1))
    if any("/" in kind for kind in kinds):
        column = column // 128 * 128
    height, width = data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, columns - column))
    buffer = torch.full((height, width + padding), float("nan"), device=device)
    merge_weights_triton(
        case.base, *case.lists, case.coefficients, buffer[:, :width], first_row=row, first_column=column
    )
    block = slice(row, row + height), slice(column, column + width)
    kit.assert_within(buffer[:, :width], case.merged[block], bound(kit, case, torch.float32)[block])
    assert buffer[:, width:].isnan().all()


# --- offsets beyond 2^31 elements: the interpreter's int32 wraps around like a GPU's ---


@jit
def _copy_row_int32(out, matrix, row, stride, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, WIDTH)
    tl.store(out + columns, tl.load(matrix + row * stride + columns))


def test_far_memory_shows_offsets_in_32_bits(kit: Any, device: torch.device) -> None:
    matrix, out = kit.FarMatrix(kit.numbers(1, 16, seed=0), 2**20, 1000), torch.empty(1, 16)
    with kit.far_memory(matrix):
        _copy_row_int32[(1,)](out, matrix, 1000, 2**20, 16)
        assert torch.equal(out, matrix.real)
        matrix.first_row = 3000
        with pytest.raises(Exception, match="outside of the matrix"):
            _copy_row_int32[(1,)](out, matrix, 3000, 2**20, 16)


@settings(max_examples=20)
@given(
    stride=st.integers(2**10, 2**30), offset=st.integers(2**31, 2**40), rows=st.integers(1, 9), indexed=st.booleans()
)
def test_kernel_far_offsets(kit: Any, device: torch.device, stride: int, offset: int, rows: int, indexed: bool) -> None:
    row = offset // stride + 1  # its first element lies past 2^31 others
    case = kit.weights(["float32", "int8/32", "int4/64"], (rows, 70))
    values, scales, groups = case.lists
    far = [kit.FarMatrix(tensor, stride, row) for tensor in (case.base, *values, *scales[1:])]
    out = torch.empty(rows, 70)
    where: dict[str, Any] = {"index": torch.arange(row, row + rows)} if indexed else {"first_row": row}
    with kit.far_memory(*far):
        merge_weights_triton(far[0], far[1:4], [scales[0], *far[4:]], groups, case.coefficients, out, **where)
    kit.assert_within(out, case.merged, bound(kit, case, torch.float32))


@pytest.mark.parametrize("stride", [2**29, 2**31 - 1, 2**33])
def test_kernel_writes_at_far_offsets(kit: Any, device: torch.device, stride: int) -> None:
    case = kit.weights(["float32"], (9, 70))
    out = kit.FarMatrix(torch.empty(9, 70), stride)
    with kit.far_memory(out):
        merge_weights_triton(case.base, *case.lists, case.coefficients, out)
    kit.assert_within(out.real, case.merged, bound(kit, case, torch.float32))


# --- the torch reference ---


@pytest.mark.parametrize("experts", [1, 2, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_equals_the_formula(kit: Any, dtype: torch.dtype, experts: int) -> None:
    kinds = [kit.KINDS[i % len(kit.KINDS)] for i in range(experts)]
    case = kit.weights(kinds, (7, 133), base=dtype)
    merged = merge_weights_reference(case.base, case.vectors, case.coefficients.tolist())
    assert merged.dtype == dtype
    kit.assert_within(merged, case.merged, (experts + 2) * kit.UNIT[dtype] * case.magnitude)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_reference_sums_in_float32_and_rounds_once(kit: Any, stored: torch.dtype) -> None:
    base = kit.numbers(64, 64, seed=0, dtype=torch.bfloat16)
    vectors = [kit.numbers(64, 64, seed=i + 1, scale=0.004, dtype=stored) for i in range(4)]
    c = [0.25] * 4
    exact = base.double() + sum(0.25 * vector.double() for vector in vectors)
    summed = merge_weights_reference(base, vectors, c)
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed.double(), exact, rtol=1e-6, atol=1e-7)
    out = torch.empty_like(base)
    merged = merge_weights_reference(base, vectors, c, out=out)
    assert merged.data_ptr() == out.data_ptr()
    torch.testing.assert_close(merged, exact.float().bfloat16(), rtol=0, atol=0)
    added_in_bfloat16 = base.clone()
    for vector in vectors:
        added_in_bfloat16 += 0.25 * vector.bfloat16()
    lost = (added_in_bfloat16.double() - exact).norm()
    assert (merged.double() - exact).norm() < 0.9 * lost  # what one rounding is for


def test_reference_takes_low_rank_and_generators(kit: Any) -> None:
    base, a, b = (kit.numbers(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(6, 9), (2, 9), (6, 2)]))
    dense = kit.numbers(6, 9, seed=7, dtype=torch.float64)
    merged = merge_weights_reference(base, (vector for vector in (LowRank(a, b), dense)), [0.5, -2.0])
    torch.testing.assert_close(merged, base + 0.5 * b @ a - 2.0 * dense, rtol=1e-13, atol=1e-13)


def test_reference_changes_no_input(kit: Any) -> None:
    case = kit.weights(["float32", "int8/32", "float16"], (9, 40))
    before = [tensor.clone() for tensor in (case.base, *case.lists[0], *case.lists[1])]
    whole = merge_weights_reference(case.base, case.vectors, [0.5, 1.0, 2.0])
    after = (case.base, *case.lists[0], *case.lists[1])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert whole.data_ptr() != case.base.data_ptr()


def test_reference_zero_coefficients_give_the_base_bits_even_beside_infinite_task_vectors(kit: Any) -> None:
    base = kit.numbers(4, 4, seed=0)
    assert torch.equal(merge_weights_reference(base, [torch.full((4, 4), float("inf"))], [0.0]), base)


def test_reference_without_base_and_with_zero_coefficients_is_zero() -> None:
    out = torch.full((3, 4), float("nan"))
    assert torch.equal(merge_weights_reference(None, [torch.ones(3, 4)], [0.0], out=out), torch.zeros(3, 4))


def test_number_of_coefficients_must_match() -> None:
    with pytest.raises(ValueError):
        merge_weights_reference(torch.zeros(2, 2), [torch.zeros(2, 2)], [1.0, 2.0])


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32),
     (torch.bfloat16, torch.float32)],
)  # fmt: skip
def test_accumulation_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert accumulation_dtype(dtype) is expected


@given(data=st.data(), rows=st.integers(1, 12), columns=st.integers(1, 150), padding=st.integers(0, 3))
def test_merge_weights_any_block(kit: Any, data: st.DataObject, rows: int, columns: int, padding: int) -> None:
    """The function that layers call, on CPU tensors: the reference, at any column."""
    kinds = data.draw(st.lists(st.sampled_from(kit.KINDS), min_size=1, max_size=4))
    base = data.draw(st.sampled_from([torch.float32, torch.bfloat16, None]))
    per_row = data.draw(st.booleans())
    case = kit.weights(kinds, (rows, columns), base=base, per_row=per_row, padding=padding)
    r0, r1 = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    c0, c1 = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    out = torch.empty(r1 - r0, c1 - c0, dtype=dtype)
    merge_weights(case.base, *case.lists, case.coefficients, case.shape, (r0, r1), (c0, c1), out)
    if out.numel():
        sums = bound(kit, case, torch.float32)[r0:r1, c0:c1]
        stored = kit.UNIT[dtype] * (case.merged[r0:r1, c0:c1].abs() + sums)
        kit.assert_within(out, case.merged[r0:r1, c0:c1], sums + stored)


def test_cpu_tensors_and_float64_take_the_reference(kit: Any) -> None:
    assert not use_triton(torch.zeros(1))


# --- the custom op ---


@pytest.mark.parametrize("shape", [(5, 70), (70,)])
def test_merged_weight_gradient_by_finite_differences(kit: Any, shape: tuple[int, ...]) -> None:
    base = kit.numbers(*shape, seed=0, dtype=torch.float64)
    values, scales, groups = [kit.numbers(*shape, seed=1, dtype=torch.float64)], [torch.empty(0)], [0]
    if len(shape) == 2:
        for kind in ("int8/32", "int4/64"):
            vector = kit.task_vector(kind, shape, seed=2)
            values, scales, groups = [*values, vector.values], [*scales, vector.scales], [*groups, vector.group_size]
    c = kit.numbers(len(values), seed=9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: merged_weight(base, values, scales, groups, c), c)


def test_merged_weight_is_a_well_formed_op(kit: Any) -> None:
    case = kit.weights(["float32", "int4/32"], (3, 34))
    c = case.coefficients.clone().requires_grad_()
    torch.library.opcheck(merged_weight, (case.base, *(list(part) for part in case.lists), c))


@pytest.mark.parametrize("shape", [(33, 70), (70,), (4, 3, 5)])
@pytest.mark.parametrize("gradient", ["dense", "expanded", "transposed"])
def test_merged_weight_by_the_kernels(
    kit: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], gradient: str
) -> None:
    """Forward and backward as on a GPU, on vectors, matrices and more, with gradients of any strides."""
    from scalemerge.kernels import coefficient_grad

    if device.type == "cpu":
        monkeypatch.setattr(module, "use_triton", lambda tensor: True)
        monkeypatch.setattr(coefficient_grad, "use_triton", lambda tensor: True)
    base = kit.numbers(*shape, seed=0)
    vectors = [kit.numbers(*shape, seed=1 + i) for i in range(3)]
    c = torch.tensor([0.5, -1.0, 2.0], device=device, requires_grad=True)
    upstream = {
        "dense": kit.numbers(*shape, seed=8),
        "expanded": torch.ones(1).expand(shape),
        "transposed": kit.numbers(*reversed(shape), seed=8).permute(*reversed(range(len(shape)))),
    }[gradient]
    merged = merged_weight(
        base.to(device), [vector.to(device) for vector in vectors], [torch.empty(0, device=device)] * 3, [0] * 3, c
    )
    merged.backward(upstream.to(device))
    exact = base.double() + 0.5 * vectors[0].double() - vectors[1].double() + 2 * vectors[2].double()
    kit.assert_within(merged, exact, 1e-6 * (exact.abs() + 4))
    products = torch.stack([upstream.double() * vector.double() for vector in vectors]).flatten(1)
    assert c.grad is not None
    kit.assert_within(c.grad, products.sum(1), 1e-6 * products.abs().sum(1))
