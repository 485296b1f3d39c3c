"""merge_weights: W0 + sum c_i T_i against the formula written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalemerge.kernels.merge_weights import accumulation_dtype, merge_weights_reference


def numbers(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def naive(base: torch.Tensor, task_vectors: list[torch.Tensor], c: list[float]) -> torch.Tensor:
    total = base.double().clone()
    for value, task_vector in zip(c, task_vectors, strict=True):
        total = total + value * task_vector.double()
    return total


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("experts", [1, 2, 6])
def test_equals_the_formula(dtype: torch.dtype, tolerance: float, experts: int) -> None:
    base = numbers(7, 5, seed=0, dtype=dtype)
    vectors = [numbers(7, 5, seed=i + 1, dtype=dtype) for i in range(experts)]
    c = [0.3, -1.2, 0.0, 2.0, 0.7, -0.1][:experts]
    merged = merge_weights_reference(base, vectors, c)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), naive(base, vectors, c), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16_base_is_summed_in_float32_and_rounded_once(stored: torch.dtype) -> None:
    base = numbers(64, 64, seed=0, dtype=torch.bfloat16)
    vectors = [numbers(64, 64, seed=i + 1, scale=0.004, dtype=stored) for i in range(4)]
    c = [0.25] * 4
    exact = merge_weights_reference(base, vectors, c)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), naive(base, vectors, c), rtol=1e-6, atol=1e-7)
    out = torch.empty_like(base)
    merged = merge_weights_reference(base, vectors, c, out=out)
    assert merged.data_ptr() == out.data_ptr()
    torch.testing.assert_close(merged, naive(base, vectors, c).float().bfloat16(), rtol=0, atol=0)
    added_in_bfloat16 = base.clone()
    for vector in vectors:
        added_in_bfloat16 += 0.25 * vector.bfloat16()
    lost = (added_in_bfloat16.double() - naive(base, vectors, c)).norm()
    assert (merged.double() - naive(base, vectors, c)).norm() < 0.9 * lost  # what one rounding is for


def test_inputs_are_not_changed_and_rows_are_a_slice() -> None:
    base, vector = numbers(9, 3, seed=0), numbers(9, 3, seed=1)
    before = base.clone(), vector.clone()
    whole = merge_weights_reference(base, [vector], [0.5])
    assert torch.equal(base, before[0]) and torch.equal(vector, before[1])
    assert whole.data_ptr() != base.data_ptr()
    for start, stop in ((0, 9), (0, 1), (4, 7), (8, 9), (5, 5)):
        torch.testing.assert_close(merge_weights_reference(base, [vector], [0.5], start, stop), whole[start:stop])


def test_out_buffer_is_written_in_place_without_a_copy() -> None:
    base, vector = numbers(6, 4, seed=0, dtype=torch.float32), numbers(6, 4, seed=1, dtype=torch.float32)
    buffer = torch.full((3, 4), float("nan"))
    merged = merge_weights_reference(base, [vector], [2.0], 1, 4, out=buffer)
    assert merged is buffer
    torch.testing.assert_close(buffer, (base + 2 * vector)[1:4])


def test_all_zero_coefficients_give_the_base_bit_for_bit_even_beside_infinite_task_vectors() -> None:
    base = numbers(4, 4, seed=0, dtype=torch.float32)
    assert torch.equal(merge_weights_reference(base, [torch.full((4, 4), float("inf"))], [0.0]), base)


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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    rest=st.lists(st.integers(1, 5), max_size=2),
    c=st.lists(st.floats(-3, 3), min_size=1, max_size=8),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    strided=st.booleans(),
)
def test_any_shape_range_and_stride(rows: int, rest: list[int], c: list[float], cut: tuple, strided: bool) -> None:
    tensors = [numbers(rows, *rest, seed=i) for i in range(len(c) + 1)]
    if strided:  # every second row of something larger
        tensors = [torch.stack([tensor, -tensor], dim=1).flatten(0, 1)[::2] for tensor in tensors]
    start, stop = sorted(round(x * rows) for x in cut)
    merged = merge_weights_reference(tensors[0], tensors[1:], c, start, stop)
    torch.testing.assert_close(merged, naive(tensors[0], tensors[1:], c)[start:stop], rtol=1e-13, atol=1e-13)
